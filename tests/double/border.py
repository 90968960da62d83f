"""Where NumPy arrays become tensors: the only file here that knows torch, and how the oracle is called."""

from collections.abc import Callable

import numpy as np
import torch

import moe_ref
from moe_ref import CountingComm, Groups, MoESpec, MoEWeights, Parallel, Routing
from tests.double import layer as double
from tests.double.layer import Arrays

Layer = Callable[..., np.ndarray]


def to_weights(arrays: Arrays) -> MoEWeights:
    """The unsharded parameters as fp64 tensors."""
    return MoEWeights(**{name: torch.from_numpy(array.copy()) for name, array in arrays.items()})


def optional_tensor(array: np.ndarray | None) -> torch.Tensor | None:
    """None stays None."""
    return None if array is None else torch.from_numpy(array.copy())


def oracle_moe(x_TH: np.ndarray, arrays: Arrays, spec: MoESpec, parallel: Parallel | None = None, *,
               routing: Routing | None = None, logits_TE: np.ndarray | None = None,
               residual_TH: np.ndarray | None = None, calls: list | None = None) -> np.ndarray:
    """moe_ref.moe on virtual ranks; every rank must return the same bits. `calls` collects collectives."""
    parallel, weights = parallel or Parallel(), to_weights(arrays)

    def body(comm: moe_ref.LocalComm) -> torch.Tensor:
        counting = CountingComm(comm)
        y_TH = moe_ref.moe(torch.from_numpy(x_TH.copy()), weights.shard(parallel, comm.rank), spec, parallel,
                           Groups(tp=counting), routing=routing, logits_TE=optional_tensor(logits_TE),
                           residual_TH=optional_tensor(residual_TH))
        if calls is not None:
            calls.append(counting.calls)
        return y_TH

    results = moe_ref.run_virtual_ranks(parallel.tp, body)
    assert all(torch.equal(result, results[0]) for result in results), "ranks disagree"
    return results[0].numpy()


def double_moe(x_TH: np.ndarray, arrays: Arrays, spec: MoESpec, parallel: Parallel | None = None, *,
               routing: Routing | None = None, logits_TE: np.ndarray | None = None,
               residual_TH: np.ndarray | None = None) -> np.ndarray:
    """The double behind the same signature."""
    if routing is None:
        return double.moe(x_TH, arrays, spec, parallel, logits_TE=logits_TE, residual_TH=residual_TH)
    ids_TK, weights_TK = routing.ids_TK.numpy(), routing.weights_TK.numpy()
    return double.layer(x_TH, ids_TK, weights_TK, arrays, spec, parallel, residual_TH)
