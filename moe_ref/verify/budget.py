"""The error budget of a case: what of a layer's error comes from codes, from stores, from sums and from ranks.

Each part is a root mean square over the whole output, relative to the output's own. What rounding operands to codes
does is known, and is computed: it is the difference of two truths. The rest is predicted, by the variances of the
output chain (bounds/output_chain.py): of the same layer with one thing after the other left out.
"""

from dataclasses import dataclass, replace

import torch

from moe_ref.contract.capabilities import ROUNDED_OPERANDS, Numerics
from moe_ref.contract.case import Case
from moe_ref.contract.schemes import ENCODINGS, Codes, Scales
from moe_ref.contract.shares import rank_shares
from moe_ref.contract.vocabulary import Format, Scheme
from moe_ref.inputs.build import Inputs, build_inputs
from moe_ref.oracle.router import route
from moe_ref.tolerances.contracts import contract
from moe_ref.tolerances.load import load_tolerances
from moe_ref.verify.bounds.output_chain import OutputChain
from moe_ref.verify.bounds.rounding import RoundingModel
from moe_ref.verify.bounds.rows import Rows, exact
from moe_ref.verify.bounds.steps import EncodedOperands, Steps
from moe_ref.verify.decoded import decoded_inputs
from moe_ref.verify.measure.placing import servers

LARGEST_CASE = 2**29
"""Products of one projection of a case that is computed in seconds."""


@dataclass(frozen=True)
class Budget:
    """Root mean squares over that of the output.

    decoded: of rounding decoded weights; operands: of rounding rows to 8 bits. borders: of codes that become another
    one, since rows err; stores: of rows and sums that are stored; accumulation: of long sums; reduction: of additions
    between ranks. All but the first two are predicted.
    """

    decoded: float
    operands: float
    borders: float
    stores: float
    accumulation: float
    reduction: float

    @property
    def total(self) -> float:
        """Of independent parts together."""
        parts = (self.decoded, self.operands, self.borders, self.stores, self.accumulation, self.reduction)
        return sum(part**2 for part in parts) ** 0.5


def usual_numerics(case: Case) -> Numerics:
    """The contract that most implementations of a case's scheme have: rows in the model's dtype, sums in fp32."""
    dtype, scheme = case.problem.dtype, case.problem.scheme
    plain = contract("stored_rows", dtype)
    if scheme is Scheme.PLAIN:
        return plain
    encoding = ENCODINGS[scheme]
    if encoding.codes is Codes.E4M3:
        products = {Scheme.FP8_TENSOR: "fp8_tensor", Scheme.FP8_ROW: "fp8_row", Scheme.FP8_BLOCK: "fp8_block"}
        return replace(plain, products=products.get(scheme, "mxfp8"))  # pyrefly: ignore
    # Codes that are exact in 16 bits are multiplied, and scales that all of a sum shares join it.
    joins = encoding.columns is None or encoding.scales is Scales.E4M3
    return plain if joins else replace(plain, decoded=Format(dtype.value))


def is_small(case: Case) -> bool:
    """Whether a budget takes seconds."""
    spec = case.problem.spec
    return case.problem.num_tokens * spec.top_k * spec.hidden_size * spec.intermediate_size <= LARGEST_CASE


def error_budget(case: Case, numerics: Numerics, hardware: str = "cpu") -> Budget:
    """The parts of the output's error under a contract; routing as the oracle chooses it."""
    inputs = build_inputs(case.problem)
    real = replace(numerics, products="exact", decoded=None)
    as_decoded = replace(numerics, products="exact") if numerics.products in ROUNDED_OPERANDS else numerics
    truth, decoded, full = (_output(case, inputs, one, hardware) for one in (real, as_decoded, numerics))
    whole_sums = replace(as_decoded, reduce=Format.FP64)
    sums = _output(case, inputs, whole_sums, hardware)
    bare = _output(case, inputs, replace(whole_sums, storage={}, activation=None, merge=None), hardware)
    scale = _root(truth.value.square())
    accumulation, stored, summed, rounded = (_mean(one) for one in (bare, sums, decoded, full))
    return Budget(
        decoded=_root((decoded.value - truth.value).square()) / scale,
        operands=_root((full.value - decoded.value).square()) / scale,
        borders=max(0.0, rounded - summed) ** 0.5 / scale, stores=max(0.0, stored - accumulation) ** 0.5 / scale,
        accumulation=accumulation**0.5 / scale, reduction=max(0.0, summed - stored) ** 0.5 / scale)


def _output(case: Case, inputs: Inputs, numerics: Numerics, hardware: str) -> Rows:
    """The output chain's truth and variance."""
    inputs, problem, shares = decoded_inputs(inputs, numerics), case.problem, rank_shares(case)
    model = RoundingModel.of(load_tolerances(), hardware, numerics, problem.dtype)
    steps = Steps(problem.spec, numerics, model, EncodedOperands.of(inputs))
    routing = inputs.routing or route(inputs.x_TH.nan_to_num(0.0, 0.0, 0.0), inputs.weights, problem.spec,
                                      logits_TE=inputs.logits_TE)
    chain, server_TK = OutputChain(steps, inputs.x_TH, case.parallel, shares), servers(routing.ids_TK, case, shares)
    for e in range(problem.spec.num_choices):
        token_R, slot_R = (routing.ids_TK == e).nonzero(as_tuple=True)
        if not len(token_R):
            continue
        weight = exact(routing.weights_TK.double()[token_R, slot_R, None])
        if e < problem.spec.num_experts:
            chain.routed(token_R, inputs.weights.expert(e), weight, server_TK[token_R, slot_R], e)
        else:
            chain.identity(token_R, weight)
    if shared := inputs.weights.shared_expert():
        shared_TS = routing.shared_TS
        chain.shared(shared, None if shared_TS is None or not shared_TS.shape[1] else exact(shared_TS))
    return chain.finish(inputs.residual_TH, inputs.weights.output_bias_H)


def _mean(rows: Rows) -> float:
    """Mean of the variance over elements of which something is predicted."""
    variance = torch.zeros(()) if rows.variance is None else rows.variance[torch.isfinite(rows.variance)]
    return float(variance.mean()) if variance.numel() else 0.0


def _root(squares: torch.Tensor) -> float:
    known = squares[torch.isfinite(squares)]
    return float(known.mean().sqrt()) if known.numel() else 0.0
