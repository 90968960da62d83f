"""Protects the reading of quantised checkpoints: every format, whole and by every rank, to the bit."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moe_ref import moe
from moe_ref.checkpoints.quantised_reader import open_quantised
from moe_ref.checkpoints.quantised_writer import store_quantised
from moe_ref.contract.comm import grid_groups
from moe_ref.contract.local_comm import LocalComm, run_virtual_ranks
from moe_ref.contract.parallel import Parallel
from moe_ref.contract.quantised import check_quantised
from moe_ref.contract.spec import MLP, MoESpec, Router, SharedExpert
from tests.distinct_encoded import assert_same_weights, decoded_weights, make_weights
from tests.quantised_configs import CONFIGS

HIDDEN, INTERMEDIATE, EXPERTS, TOKENS = 160, 288, 3, 5
"""Neither is a multiple of 128: the last blocks are partial, and tp 2, 3 and 4 all cut blocks of 128 in their midst."""
ROUTER = Router(num_experts=EXPERTS, top_k=2, renormalize=True)
SHARING = MoESpec(hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, router=ROUTER,
                  shared=SharedExpert(intermediate_size=192))
OAI = MoESpec(hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, router=replace(ROUTER, logit_bias=True),
              experts=MLP(bias=True, limit=7.0, sigmoid_scale=1.702, up_offset=1.0))
LAYER = 2


def family_of(name: str) -> tuple[str, MoESpec]:
    """The naming and the layer that a format is tested with: DeepSeek's, with a shared expert, but for gpt-oss."""
    return ("gpt_oss", OAI) if name == "gpt_oss_mxfp4" else ("deepseek_v3", SHARING)


def write(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, object]) -> Path:
    """A checkpoint of one file, with a tensor of attention that is none of the layer's, and its config.json."""
    save_file(tensors | {f"model.layers.{LAYER}.self_attn.o_proj.weight": torch.zeros(2, 2)},
              folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    return folder


@pytest.fixture(scope="module", params=CONFIGS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """The path, family, layer and weights of a small checkpoint in one format."""
    scheme, config = CONFIGS[request.param]
    family, spec = family_of(request.param)
    weights = make_weights(scheme, spec)
    path = tmp_path_factory.mktemp(request.param)
    return write(path, store_quantised(weights, LAYER, family, spec, config), config), family, spec, weights


PLACES = {"whole": Parallel(), "tp2": Parallel(tp=2), "tp3": Parallel(tp=3), "tp4": Parallel(tp=4),
          "ep2": Parallel(ep=2), "ep2_tp3": Parallel(ep=2, tp=3, hosting="round_robin", shared="replicated"),
          "gather": Parallel(tp=3, schedule="gather"), "odd_shares": Parallel(tp=3, splits=(37, 0, 12)),
          "a_rank_without_experts": Parallel(ep=4)}


@pytest.mark.sampled(every=8, each="saved")
@pytest.mark.parametrize("parallel", PLACES.values(), ids=PLACES)
def test_every_rank_reads_its_part(saved: tuple, parallel: Parallel) -> None:
    """Bit by bit the part that QuantisedWeights.shard cuts from the whole; and as numbers, the part of the decoded
    matrices that MoEWeights.shard cuts, which knows of no block and no word."""
    path, family, spec, weights = saved
    whole = decoded_weights(weights)
    for rank in range(parallel.size):
        read = open_quantised(path, LAYER, family, spec, parallel, rank)
        check_quantised(read, spec, parallel, rank)
        assert_same_weights(read, weights.shard(parallel, rank))
        wanted = dict(whole.shard(parallel, rank).named_tensors())
        for name, tensor in decoded_weights(read).named_tensors():
            assert torch.equal(tensor, wanted[name]), (name, rank)


@pytest.mark.sampled(every=4, each="saved")
@pytest.mark.parametrize("parallel", [PLACES[name] for name in ("tp2", "tp3", "tp4", "ep2")],
                         ids=["tp2", "tp3", "tp4", "ep2"])
def test_ranks_add_up_to_the_layer(saved: tuple, parallel: Parallel) -> None:
    """Every rank from the file, in the oracle: the whole layer's output up to the rounding of fp64 sums."""
    path, family, spec, weights = saved
    x_TH = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(3))

    def rank_main(comm: LocalComm) -> torch.Tensor:
        read = open_quantised(path, LAYER, family, spec, parallel, comm.rank)
        return moe(x_TH, read, spec, parallel, grid_groups(comm, parallel.tp, parallel.ep))

    whole_TH = moe(x_TH, decoded_weights(weights), spec)
    assert whole_TH.abs().max() > 1e-3
    for y_TH in run_virtual_ranks(parallel.size, rank_main):
        torch.testing.assert_close(y_TH, whole_TH, rtol=0, atol=1e-14 * float(whole_TH.abs().max()))
