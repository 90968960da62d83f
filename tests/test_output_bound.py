"""Protects the bound of a whole layer for a given routing: right layers stay inside, and it is not for nothing.

Its truth is the oracle's, its steps are those that cases are judged with.
"""

import math
from collections.abc import Iterator

import pytest
import torch

from moe_ref.contract.case import Problem
from moe_ref.contract.case_id import parse_case
from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.routing import Routing
from moe_ref.contract.trace import Trace
from moe_ref.contract.vocabulary import Data, Dtype, Format, Stage
from moe_ref.inputs.build import Inputs, build_inputs
from moe_ref.inputs.shards import build_shards
from moe_ref.oracle.layer import experts
from moe_ref.tiers.tiers import tier
from moe_ref.tolerances.load import load_tolerances
from moe_ref.verify.bounds.output import output_bound
from moe_ref.verify.bounds.rounding import RoundingModel
from tests.subjects.base import Call
from tests.subjects.mistaken_experts import MeanAsSum, NoClamp, NoUpOffset, UpBiasDropped
from tests.subjects.whole import WholeSpec
from tests.subjects.whole_variants import EagerLoop, FP32Throughout, WeightedActivation

MODEL = RoundingModel(load_tolerances(), "cpu", Format.FP32)


def problems(dtype: Dtype) -> Iterator[Problem]:
    """Finite layers of the families tier with a routing of their own."""
    for one in tier("families").cases:
        problem = one.case.problem
        if problem.dtype is dtype and one.case.parallel.tp == 1 and problem.data is not Data.NON_FINITE:
            yield problem


def run(subject: WholeSpec, problem: Problem) -> tuple[Inputs, Routing, torch.Tensor]:
    """What a subject returns, less the residual, and the routing it used, as it was stored."""
    inputs, kept = build_inputs(problem), []

    def remember(call: Call, logits_TE: torch.Tensor | None):
        kept.append(type(subject).routing(subject, call, logits_TE))
        return kept[-1]

    subject.routing = remember  # pyrefly: ignore
    trace = Trace()
    y_TH = subject.moe(inputs.x_TH, build_shards(problem, parse_case(f"v1-T1.H8.I8-{problem.dtype}").parallel)[0],
                       problem.spec, logits_TE=inputs.logits_TE, trace=trace)
    routing = Routing(trace.tensors[Stage.IDS], trace.tensors[Stage.WEIGHTS].double(), shared_TS=kept[0][2])
    return inputs, routing, y_TH


def ratio(subject: WholeSpec, problem: Problem) -> float:
    """Largest error / allowed; -1 where no token is."""
    inputs, routing, y_TH = run(subject, problem)
    numerics = subject.CAPABILITIES.numerics[problem.dtype]
    truth_TH, bound_TH = output_bound(inputs.x_TH, routing, inputs.weights, problem.spec, numerics, MODEL)
    # The same sums in fp64, with partial sums looked at in between: in another order.
    oracle_TH = experts(inputs.x_TH, routing, inputs.weights, problem.spec)
    assert torch.allclose(truth_TH, oracle_TH, rtol=1e-12, atol=1e-12, equal_nan=True)
    return max(((y_TH.double() - truth_TH).abs() / bound_TH).flatten().tolist(), default=-1.0)


@pytest.mark.sampled(every=8)
@pytest.mark.parametrize(("subject", "dtype"), [
    (WholeSpec, Dtype.FP32), (WholeSpec, Dtype.BF16), (EagerLoop, Dtype.BF16), (WeightedActivation, Dtype.BF16),
    (FP32Throughout, Dtype.BF16)])
def test_right_layers_stay_inside(subject: type[WholeSpec], dtype: Dtype) -> None:
    """Every layer of the families tier, whatever the contract says of rounding."""
    found = {problem: ratio(subject(), problem) for problem in problems(dtype)}
    assert max(found.values()) <= 1.0, max(found, key=lambda problem: found[problem])


@pytest.mark.parametrize(("mistake", "words"), [
    (NoClamp, "T21.H48.I40.E8.K2-fp32-norm-limit1"), (MeanAsSum, "T21.H48.I40.E8.K2-fp32-norm-sh26-shmean"),
    (NoUpOffset, "T21.H48.I40.E8.K2-bf16-norm-limit1-up1"),
    (UpBiasDropped, "T21.H48.I40.E8.K2-bf16-norm-mlpbias")])
def test_mistakes_fall_outside(mistake: type[WholeSpec], words: str) -> None:
    """A bound that nothing exceeds would say nothing."""
    assert ratio(mistake(), parse_case(f"v1-{words}").problem) > 1.5


def test_coarser_contracts_allow_more() -> None:
    """fp32 rows, rows in bf16, every step in bf16: each bound contains the one before, none is infinite."""
    problem = parse_case("v1-T21.H48.I40.E8.K2-bf16-norm-gelutanh-sh26").problem
    inputs, routing, _ = run(WholeSpec(), problem)
    bounds = [output_bound(inputs.x_TH, routing, inputs.weights, problem.spec,
                           subject.CAPABILITIES.numerics[Dtype.BF16], MODEL)[1]
              for subject in (FP32Throughout(), WholeSpec(), EagerLoop())]
    assert (bounds[0] < bounds[1]).all()
    assert (bounds[1] < bounds[2]).all()
    assert math.isfinite(float(bounds[2].max()))


def test_shared_weights_of_the_router_cannot_be_guessed() -> None:
    """They take part in the renormalisation, so a routing without them is incomplete; the message says so."""
    problem = parse_case("v1-T4.H16.I16.E4.K2-fp32-sigmoid-norm-sh16-shrouter2").problem
    inputs = build_inputs(problem)
    routing = Routing(torch.zeros(4, 2, dtype=torch.int64), torch.ones(4, 2))
    with pytest.raises(UsageValueError, match=r"shared_TS is missing, but .* \(T, 2\)"):
        output_bound(inputs.x_TH, routing, inputs.weights, problem.spec,
                     WholeSpec().CAPABILITIES.numerics[Dtype.FP32], MODEL)
