"""Where NumPy arrays become tensors: the only file here that knows torch, and how the oracle is called."""

from collections.abc import Callable

import numpy as np
import torch

import moe_ref
from moe_ref import CountingComm, Groups, MoESpec, MoEWeights, Parallel, Routing
from tests.double import layer as double
from tests.double.layer import Arrays
from tests.double.router import Choice

Layer = Callable[..., np.ndarray]


def to_weights(arrays: Arrays) -> MoEWeights:
    """The unsharded parameters as fp64 tensors, in memory that torch aligns: equal calls shall have equal bits."""
    return MoEWeights(**{name: torch.tensor(array) for name, array in arrays.items()})


def optional_tensor(array: np.ndarray | None) -> torch.Tensor | None:
    """None stays None."""
    return None if array is None else torch.tensor(array)


def oracle_moe(x_TH: np.ndarray, arrays: Arrays, spec: MoESpec, parallel: Parallel | None = None, *,
               routing: Routing | None = None, logits_TE: np.ndarray | None = None,
               residual_TH: np.ndarray | None = None, calls: list | None = None) -> np.ndarray:
    """moe_ref.moe on virtual ranks; every rank must return the same bits. `calls` collects collectives."""
    parallel, weights = parallel or Parallel(), to_weights(arrays)

    def body(comm: moe_ref.LocalComm) -> torch.Tensor:
        counting = CountingComm(comm)
        y_TH = moe_ref.moe(torch.tensor(x_TH), weights.shard(parallel, comm.rank), spec, parallel,
                           Groups(tp=counting), routing=routing, logits_TE=optional_tensor(logits_TE),
                           residual_TH=optional_tensor(residual_TH))
        if calls is not None:
            calls.append(counting.calls)
        return y_TH

    results = moe_ref.run_virtual_ranks(parallel.tp, body)
    bits = [result.numpy().view(np.int64) for result in results]
    assert all(np.array_equal(other, bits[0]) for other in bits), "ranks disagree"
    return results[0].numpy()


def oracle_route(x_TH: np.ndarray, arrays: Arrays, spec: MoESpec, logits_TE: np.ndarray | None = None) -> Routing:
    """moe_ref.route of fp64 arrays."""
    return moe_ref.route(torch.tensor(x_TH), to_weights(arrays), spec,
                         logits_TE=optional_tensor(logits_TE))


def to_choices(routing: Routing, x_TH: np.ndarray, arrays: Arrays, spec: MoESpec) -> list[Choice]:
    """A routing as the double reads it; a sigmoid gate that it does not carry is computed."""
    ids_TK, weights_TK = routing.ids_TK.tolist(), routing.weights_TK.tolist()
    if routing.shared_TS is not None:
        shared_TS = routing.shared_TS.tolist()
    else:
        shared_TS = [[double.sigmoid(double.dot(x_H, row_H)) for row_H in arrays.get("shared_gate_SH", ())]
                     for x_H in x_TH]
    return [Choice(ids, ids, weights, shared)
            for ids, weights, shared in zip(ids_TK, weights_TK, shared_TS, strict=True)]


def double_moe(x_TH: np.ndarray, arrays: Arrays, spec: MoESpec, parallel: Parallel | None = None, *,
               routing: Routing | None = None, logits_TE: np.ndarray | None = None,
               residual_TH: np.ndarray | None = None) -> np.ndarray:
    """The double behind the same signature."""
    if routing is None:
        return double.moe(x_TH, arrays, spec, parallel, logits_TE=logits_TE, residual_TH=residual_TH)
    return double.layer(x_TH, to_choices(routing, x_TH, arrays, spec), arrays, spec, parallel, residual_TH)
