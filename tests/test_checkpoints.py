"""Protects the reading of released checkpoints, on files that transformers writes under their names."""

import json
from pathlib import Path

import pytest
import torch

from moe_ref import moe
from moe_ref.checkpoints.files import INDEX, SINGLE, StoredSlice
from moe_ref.checkpoints.naming import namings
from moe_ref.checkpoints.reader import open_checkpoint
from moe_ref.contract.comm import Groups
from moe_ref.contract.local_comm import LocalComm, run_virtual_ranks
from moe_ref.contract.parallel import Parallel
from moe_ref.contract.spec import MLP, MoESpec, Router
from moe_ref.contract.weights import (
    EXPERT_PARAMETERS,
    ExpertWeights,
    MoEWeights,
    WeightSource,
    check_expert,
    check_weights,
    parameter_shapes,
)
from tests.checkpoint_models import (
    EXPERTS,
    FAMILIES,
    GATE_NAME,
    HIDDEN,
    INTERMEDIATE,
    PLAIN,
    Family,
    build,
    canonical,
    mixtral,
    write,
)

BY_NAME = {family.name: family for family in FAMILIES}


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.name)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """A family, its layer's parameters in memory, a folder with one file and one with an index."""
    family: Family = request.param
    folder = tmp_path_factory.mktemp(family.name)
    model = build(family)
    model.save_pretrained(folder / "one")
    model.save_pretrained(folder / "many", max_shard_size="4KB")
    return family, canonical(model, family), folder


def layer_of(family: Family) -> int | str:
    """What open_checkpoint is told: the number, or the prefix where the saved names have another one."""
    return family.prefix or 1


def gathered(source: WeightSource, num_experts: int) -> dict[str, torch.Tensor]:
    """All parameters that a source yields, by canonical name, experts stacked."""
    experts = [source.expert(e) for e in range(num_experts)]
    tensors = {f"{field.partition('_')[0]}{'_bias' if 'bias' in field else ''}_E{field.rpartition('_')[2]}":
               torch.stack([getattr(expert, field) for expert in experts])
               for field in ExpertWeights._fields if experts and getattr(experts[0], field) is not None}
    if shared := source.shared_expert():
        tensors |= {f"shared_{field}": tensor for field, tensor in shared._asdict().items() if tensor is not None}
    whole = ("router_EH", "router_bias_E", "selection_bias_E", "weight_scale_E", "shared_gate_SH", "output_bias_H")
    return tensors | {name: getattr(source, name) for name in whole if getattr(source, name) is not None}


def assert_same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    """Equal names, shapes, dtypes and bits."""
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert tensor.dtype == two[name].dtype, name
        assert torch.equal(tensor, two[name]), name


def test_every_family_of_every_naming_is_tested() -> None:
    """A family without a saved model behind it would be a guess."""
    known = sorted(family for naming in namings().values() for family in naming.families)
    assert sorted(family.model_type for family in FAMILIES) == known


@pytest.mark.sampled(every=3)
def test_a_layer_as_saved_by_transformers(saved: tuple) -> None:
    """Bit by bit the parameters of the module in memory, from one file and from many; the index is a real one."""
    family, expected, folder = saved
    assert (folder / "one" / SINGLE).is_file()
    assert len(set(json.loads((folder / "many" / INDEX).read_text())["weight_map"].values())) > 1
    for path in (folder / "one", folder / "many"):
        source = open_checkpoint(path, layer_of(family), family.model_type, family.spec)
        check_weights(source, family.spec, None, 0)
        for e in range(family.spec.num_experts):
            check_expert(source.expert(e), family.spec, Parallel(), 0, e)
        assert_same(gathered(source, family.spec.num_experts), expected)


PLACES = {"tp3": Parallel(tp=3), "gather": Parallel(tp=2, schedule="gather"), "ep2_tp2": Parallel(ep=2, tp=2),
          "ep4_in_turn_copies": Parallel(ep=4, hosting="round_robin", redundant=(0, 0), shared="replicated")}
"""Uneven tp 3 of I = 8 (3, 3, 2); w2 cut by output; a grid; experts in turn with copies, the shared expert whole. In
the grids some ranks host no expert of a dense layer."""


@pytest.mark.sampled(every=5)
@pytest.mark.parametrize("parallel", PLACES.values(), ids=PLACES)
def test_every_rank_reads_its_part(saved: tuple, parallel: Parallel) -> None:
    """Bit by bit the part of the module's parameters that tests/test_placements.py shows to be the rank's."""
    family, expected, folder = saved
    for rank in range(parallel.size):
        source = open_checkpoint(folder / "many", layer_of(family), family.model_type, family.spec, parallel, rank)
        check_weights(source, family.spec, parallel, rank)
        shard = dict(MoEWeights(**expected).shard(parallel, rank).named_tensors())
        assert source.num_experts == len(shard["w2_EHI"])
        assert_same(gathered(source, source.num_experts), {
            name: tensor for name, tensor in shard.items() if source.num_experts or name not in EXPERT_PARAMETERS})


def test_the_oracle_computes_the_same_from_a_checkpoint(saved: tuple) -> None:
    """The oracle takes the source as it is; its result has the bits that the parameters in memory give."""
    family, expected, folder = saved
    x_TH = torch.randn(7, HIDDEN, generator=torch.Generator().manual_seed(3))
    source = open_checkpoint(folder / "one", layer_of(family), family.model_type, family.spec)
    assert torch.equal(moe(x_TH, source, family.spec), moe(x_TH, MoEWeights(**expected), family.spec))


def test_ranks_add_up_to_the_layer(tmp_path: Path) -> None:
    """Four virtual ranks, each with its own slices, in one all-reduce: relu experts on small integers with a
    routing of weight 1 are exact in fp64, so the sum has the unsharded result's bits."""
    spec = MoESpec(hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, experts=MLP(activation="relu"),
                   router=Router(num_experts=EXPERTS, top_k=1, renormalize=True))
    path, parallel = write(tmp_path, mixtral()), Parallel(tp=4)
    x_TH = torch.arange(5.0 * HIDDEN).reshape(5, HIDDEN) % 7 - 3

    def rank_main(comm: LocalComm) -> torch.Tensor:
        source = open_checkpoint(path, 0, "mixtral", spec, parallel, comm.rank)
        return moe(x_TH, source, spec, parallel, Groups(tp=comm))

    whole_TH = moe(x_TH, open_checkpoint(path, 0, "mixtral", spec), spec)
    assert whole_TH.abs().max() > 0
    assert all(torch.equal(y_TH, whole_TH) for y_TH in run_virtual_ranks(4, rank_main))


def test_dtypes_are_those_stored(tmp_path: Path) -> None:
    """bf16 experts beside an fp32 router and correction bias, mixed as in released files; nothing is converted."""
    spec = BY_NAME["minimax_m2"].spec
    tensors = mixtral(torch.bfloat16) | {GATE_NAME: mixtral()[GATE_NAME] + 0.001}
    tensors["model.layers.0.block_sparse_moe.e_score_correction_bias"] = torch.linspace(0, 1, EXPERTS)
    source = open_checkpoint(write(tmp_path, tensors), 0, "minimax_m2", spec)
    assert (source.router_EH.dtype, source.selection_bias_E.dtype) == (torch.float32, torch.float32)
    assert {tensor.dtype for tensor in source.expert(0)[:2]} == {torch.bfloat16}


def test_same_names_another_layout(tmp_path: Path) -> None:
    """gpt-oss and the privacy filter share names and shapes; only the naming knows that one interleaves."""
    family = BY_NAME["gpt_oss"]
    build(family).save_pretrained(tmp_path)
    one, two = (open_checkpoint(tmp_path, 1, name, family.spec).expert(0) for name in
                ("gpt_oss", "openai_privacy_filter"))
    assert one.w13_GIH.shape == two.w13_GIH.shape
    assert not torch.equal(one.w13_GIH, two.w13_GIH)
    assert not torch.equal(one.w13_bias_GI, two.w13_bias_GI)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "granitemoeshared", "dbrx", "llama4", "aria"])
@pytest.mark.parametrize("parallel", [Parallel(tp=4), Parallel(ep=2, tp=2), Parallel(tp=4, schedule="gather")],
                         ids=["tp", "grid", "gather"])
def test_only_the_ranks_slices_are_read(name: str, parallel: Parallel, tmp_path: Path,
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """Elements read through get_slice while one rank streams its experts: exactly its parameters, each once."""
    family, elements = BY_NAME[name], []
    build(family).save_pretrained(tmp_path)
    read = StoredSlice.__getitem__

    def counted(self: StoredSlice, index: tuple[slice, ...]) -> torch.Tensor:
        tensor = read(self, index)
        elements.append(tensor.numel())
        return tensor

    monkeypatch.setattr(StoredSlice, "__getitem__", counted)
    source = open_checkpoint(tmp_path, layer_of(family), family.model_type, family.spec, parallel, 2)
    gathered(source, source.num_experts)
    shapes = parameter_shapes(family.spec, parallel, 2)
    assert sum(elements) == sum(torch.Size(shape).numel() for shape in shapes.values())


def test_more_ranks_than_columns(tmp_path: Path) -> None:
    """Eight columns over sixteen ranks: every second rank reads empty slices, and their shapes are right."""
    parallel, path = Parallel(tp=16), write(tmp_path, mixtral())
    for rank in range(16):
        expert = open_checkpoint(path, 0, "mixtral", PLAIN, parallel, rank).expert(0)
        assert expert.w13_GIH.shape == (2, 1 - rank % 2, HIDDEN)
        assert expert.w2_HI.shape == (HIDDEN, 1 - rank % 2)
