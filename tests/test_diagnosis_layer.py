"""Protects what diagnoses are made of: the layer that faults are planted in is right, and every fault can be computed.
"""

import pytest
import torch

from moe_ref.contract.case import Case
from moe_ref.contract.case_id import parse_case
from moe_ref.contract.comm import grid_groups
from moe_ref.contract.local_comm import LocalComm, run_virtual_ranks
from moe_ref.contract.routing import Routing
from moe_ref.contract.shares import rank_shares
from moe_ref.contract.trace import Trace
from moe_ref.contract.vocabulary import Stage
from moe_ref.inputs.build import Inputs, build_inputs, cut_tokens
from moe_ref.inputs.shards import build_shards
from moe_ref.oracle.layer import moe
from moe_ref.simulated.subjects import usual_numerics
from moe_ref.verify.diagnosis.diagnose import FAULTS
from moe_ref.verify.diagnosis.known import Known
from moe_ref.verify.diagnosis.layer import Layer
from moe_ref.verify.diagnosis.placed import placed
from moe_ref.verify.measure.placing import RankTensors, over_all_tokens, servers

SPREADS = ("", "-tp2", "-tp3-split5.0.3", "-tp2-ep2", "-tp2-allreducerows", "-tp2-reducescatter", "-tp2-gather",
           "-tp3-reducescatter-tokenstp", "-ep2-tokensep", "-ep2-roundrobin", "-tp2-ep2-reducescatter-tokensboth",
           "-ep3-copy0.2", "-tp2-ep2-allreducerows-tokensep", "-tp2-wholeshared", "-tp2-ep2-tokensep-wholeshared")
CASES = [f"v1-T13.H12.I10.E6.K3-fp32-{words}{spread}" for spread in SPREADS
         for words in ("norm-mlpbias-sh6-shgate-shmlpbias-shmean-outbias-res", "scale2.5-zero3-sh6")] + [
    "v1-T13.H12.I10.E6.K3-fp32-norm-weightinput-tp2", "v1-T13.H12.I10-fp32-gelu-res-tp2",
    "v1-T13.H12.I10.E6.K3-fp32-sigmoid-norm-bias-g3.2-top2sum-sh6-shrouter2-zipf-tp2",
    "v1-T13.H12.I10.E6.K3-fp32-sigmoid-norm-cap4-capchoice-capafter-relu2-nogate",
    "v1-T13.H12.I10.E6.K3-fp32-sqrtsoftplus-biaslogit-expertscale-routerbias-logitscale0.5-limit1-alpha1.702",
    "v1-T13.H24.I16.E6.K3-bf16-norm-exact-tp2", "v1-T0.H12.I10.E6.K3-fp32-norm-tp2"]


def oracle_ranks(case: Case, inputs: Inputs) -> list[RankTensors]:
    """What every rank of the sharded oracle shows."""
    shards, shares = build_shards(case.problem, case.parallel), rank_shares(case)

    def one(comm: LocalComm) -> RankTensors:
        trace, own = Trace(), cut_tokens(inputs, shares[comm.rank].tokens)
        ids_TK, weights_TK = own.pop("ids_TK", None), own.pop("weights_TK", None)
        routing = None if ids_TK is None else Routing(ids_TK, weights_TK)
        moe(weights=shards[comm.rank], spec=case.problem.spec, parallel=case.parallel,
            groups=grid_groups(comm, tp=case.parallel.tp, ep=case.parallel.ep), routing=routing, trace=trace, **own)
        return trace.tensors

    return run_virtual_ranks(case.parallel.size, one)


@pytest.mark.sampled(every=4)
@pytest.mark.parametrize("case_id", CASES)
def test_the_right_layer_is_the_oracle_at_every_stage_of_every_rank(case_id: str) -> None:
    """So that a candidate differs from what is right by its fault alone."""
    case = parse_case(case_id)
    inputs, shares = build_inputs(case.problem), rank_shares(case)
    ranks = oracle_ranks(case, inputs)
    layer = Layer(Known(case, inputs, usual_numerics(case.problem.dtype), shares, {}))
    server_TK = servers(over_all_tokens(ranks, shares, case.problem.num_tokens)[0][Stage.IDS], case, shares)
    assert {Stage.IDS, Stage.ACT, Stage.DOWN, Stage.REDUCED} <= ranks[0].keys()
    for stage in ranks[0]:
        shown, right = placed(stage, ranks, case, shares, server_TK), layer.shown(stage)
        there = ~shown.isnan()
        assert int(there.sum()) >= sum(tensors[stage].numel() for tensors in ranks) // case.parallel.size
        # Two fp64 computations in other orders, of numbers near 1: 2^-53 times the terms of a sum, and room.
        torch.testing.assert_close(shown[there], right[there], rtol=1e-9, atol=1e-9)


@pytest.mark.sampled(every=4)
@pytest.mark.parametrize("case_id", CASES)
def test_every_fault_can_be_computed(case_id: str) -> None:
    """In every layer that has it: a candidate that raises would turn a mismatch into a fault of the harness."""
    case = parse_case(case_id)
    known = Known(case, build_inputs(case.problem), usual_numerics(case.problem.dtype), rank_shares(case), {})
    right, tried = Layer(known), 0
    for fault in FAULTS:
        for variant in fault.variants(known):
            layer = fault(known, right, variant)
            for stage in (Stage.ACT, Stage.DOWN, Stage.SHARED, Stage.MERGED, Stage.REDUCED):
                assert layer.shown(stage).shape == right.shown(stage).shape
            tried += 1
    assert tried >= 10
