"""Protects the refusals of the checkpoint reader: everything wrong is listed at once, nothing unsafe is opened."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moe_ref.checkpoints.files import INDEX, SINGLE, CheckpointFiles
from moe_ref.checkpoints.name_ranges import name_ranges
from moe_ref.checkpoints.naming import Naming, find_naming
from moe_ref.checkpoints.reader import open_checkpoint
from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.parallel import Parallel
from moe_ref.contract.spec import MoESpec, Router
from moe_ref.layouts.layout import Layout
from tests.checkpoint_models import (
    EXPERT_NAMES,
    EXPERTS,
    GATE_NAME,
    HIDDEN,
    INTERMEDIATE,
    OAI,
    PLAIN,
    mixtral,
    write,
)


def fault(path: Path, spec: MoESpec = PLAIN, naming: str = "mixtral", layer: int | str = 0) -> str:
    """What opening says."""
    with pytest.raises(UsageValueError) as caught:
        open_checkpoint(path, layer, naming, spec)
    return str(caught.value)


def test_all_faults_at_once(tmp_path: Path) -> None:
    """A missing expert, two too many, a wrong shape, an unknown tensor, and a bias that the naming cannot have."""
    tensors = mixtral()
    del tensors[EXPERT_NAMES["w2"].format(e=2)]
    tensors |= {EXPERT_NAMES["w1"].format(e=e): torch.zeros(INTERMEDIATE, HIDDEN) for e in (6, 7)}
    tensors |= {GATE_NAME: torch.zeros(EXPERTS, 5), "model.layers.0.block_sparse_moe.gate.scale": torch.zeros(3)}
    spec = MoESpec(hidden_size=HIDDEN, intermediate_size=INTERMEDIATE,
                   router=Router(num_experts=EXPERTS, top_k=2, logit_bias=True))
    said = fault(write(tmp_path, tensors), spec)
    for words in ("needs router_bias_E, but naming mixtral has no tensor", "experts.2.w2.weight is missing",
                  "experts.{6-7}.w1.weight (F32) is there", "gate.scale (F32) is there",
                  "gate.weight: shape (6, 5), but should be (6, 12)", SINGLE):
        assert words in said
    assert "self_attn" not in said


def test_every_misshaped_expert_is_named(tmp_path: Path) -> None:
    """Transposed matrices, as another naming would store them: one fault per tensor, both numbers in each."""
    said = fault(write(tmp_path, {name: tensor.T.contiguous() for name, tensor in mixtral().items()}))
    for e in range(EXPERTS):
        assert f"experts.{e}.w1.weight: shape (12, 8), but should be (8, 12)" in said
        assert f"experts.{e}.w2.weight: shape (8, 12), but should be (12, 8)" in said


@pytest.mark.parametrize(("dtype", "word"), [(torch.float8_e4m3fn, "F8_E4M3"), (torch.uint8, "U8"),
                                             (torch.int8, "I8")])
def test_quantised_experts_are_refused(dtype: torch.dtype, word: str, tmp_path: Path) -> None:
    """Their bits are no values; the tensor, its dtype and the scales beside it are named."""
    name = EXPERT_NAMES["w1"].format(e=3)
    tensors = mixtral()
    tensors |= {name: tensors[name].to(dtype), f"{name}_scale_inv": torch.ones(1, 1)}
    said = fault(write(tmp_path, tensors))
    assert f"{name}: stored as {word}, but should be one of F64, F32, F16, BF16" in said
    assert f"{name}_scale_inv (F32) is there" in said


def test_mxfp4_experts_are_refused(tmp_path: Path) -> None:
    """gpt-oss as released: blocks and scales in place of the matrices."""
    names = {f"model.layers.0.mlp.experts.{matrix}_{part}": torch.zeros(6, 2, dtype=torch.uint8)
             for matrix in ("gate_up_proj", "down_proj") for part in ("blocks", "scales")}
    said = fault(write(tmp_path, names), OAI, "gpt_oss")
    assert all(f"{name} (U8) is there" in said for name in names)
    assert "experts.gate_up_proj is missing" in said


def test_a_layer_that_is_not_there(tmp_path: Path) -> None:
    """Layer 0, not 00 or another layer's; the message shows what the file has instead."""
    path = write(tmp_path, mixtral())
    for layer in (7, "model.language_model.layers.0"):
        said = fault(path, layer=layer)
        assert "no tensor begins with model.la" in said
        assert "the first of 20 is model.layers.0.block_sparse_moe.experts.0.w1.weight" in said


@pytest.mark.parametrize("rank", [-1, 4, True])
def test_a_rank_that_is_not_there(rank: int, tmp_path: Path) -> None:
    """-1 would read another rank's slices."""
    with pytest.raises(UsageValueError, match=r"rank=.*should be .* below ep\*tp=2\*2"):
        open_checkpoint(write(tmp_path, mixtral()), 0, "mixtral", PLAIN, Parallel(ep=2, tp=2), rank)


def test_what_another_rank_misses_is_told_here_too(tmp_path: Path) -> None:
    """Expert 5 belongs to rank 1 of two, but both refuse the file: none goes on to wait for the other."""
    name = EXPERT_NAMES["w2"].format(e=5)
    path = write(tmp_path, mixtral() | {name: torch.zeros(HIDDEN, 5)})
    for rank in (0, 1):
        with pytest.raises(UsageValueError, match=rf"{name}: shape \(12, 5\), but should be \(12, 8\)"):
            open_checkpoint(path, 0, "mixtral", PLAIN, Parallel(ep=2), rank)


@pytest.mark.parametrize("e", [-1, 3])
def test_an_expert_that_the_rank_does_not_host(e: int, tmp_path: Path) -> None:
    """Six experts over two ranks: expert(i) is the i-th of three."""
    source = open_checkpoint(write(tmp_path, mixtral()), 0, "mixtral", PLAIN, Parallel(ep=2), 1)
    with pytest.raises(UsageValueError, match=rf"expert {e}, but should be in \[0, 3\)"):
        source.expert(e)


def indexed(folder: Path, file: str) -> Path:
    """A folder whose index sends the router to `file`."""
    save_file(mixtral(), folder / "a.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {
        name: file if name == GATE_NAME else "a.safetensors" for name in mixtral()}}))
    return folder


@pytest.mark.parametrize("file", ["../a.safetensors", "/etc/a.safetensors", "sub/../../a.safetensors", "a.bin",
                                  "..\\a.safetensors", "C:\\a.safetensors", "C:a.safetensors", "\\a.safetensors",
                                  "a\0.safetensors"])
def test_an_index_cannot_leave_its_folder(file: str, tmp_path: Path) -> None:
    """An index is text from elsewhere; no path in it may reach beyond the checkpoint, on any system."""
    folder = tmp_path / "inside"
    folder.mkdir()
    save_file(mixtral(), tmp_path / "a.safetensors")
    assert "should be in a .safetensors file inside the folder of the index" in fault(indexed(folder, file))


def test_links_inside_the_folder_are_followed(tmp_path: Path) -> None:
    """A download cache keeps files elsewhere and fills the folder with links."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    save_file(mixtral(), tmp_path / "blobs" / "0123")
    (tmp_path / "snapshot" / SINGLE).symlink_to("../blobs/0123")
    assert open_checkpoint(tmp_path / "snapshot", 0, "mixtral", PLAIN).num_experts == EXPERTS


@pytest.mark.parametrize(("file", "words"), [
    ("b.safetensors", "b.safetensors: no such file"),
    ("c.safetensors", "the index says c.safetensors, but that file does not hold it"),
    ("d.safetensors", "d.safetensors: not a safetensors file"),
])
def test_an_index_that_does_not_fit_its_files(file: str, words: str, tmp_path: Path) -> None:
    """A file that is missing, holds something else, or is broken off."""
    save_file({"other": torch.zeros(1)}, tmp_path / "c.safetensors")
    (tmp_path / "d.safetensors").write_bytes(b"\xff" * 100)
    assert words in fault(indexed(tmp_path, file))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.pth"])
def test_pickled_files_are_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    """Neither a folder of them nor the file itself is opened; its content is not even looked at."""
    (tmp_path / name).write_bytes(b"not a model")
    for path in (tmp_path, tmp_path / name):
        assert "are pickled, and reading one can run any code" in fault(path)


def test_paths_that_are_no_checkpoint(tmp_path: Path) -> None:
    """Nothing there, an empty folder, another kind of file, an index that is none, both kinds at once."""
    assert "no such file or folder" in fault(tmp_path / "nowhere")
    assert f"neither {SINGLE} nor {INDEX}" in fault(tmp_path)
    (tmp_path / "model.gguf").write_text("x")
    assert "should end with .safetensors" in fault(tmp_path / "model.gguf")
    (tmp_path / INDEX).write_text('{"weight_map": 3}')
    assert "not an index of safetensors files" in fault(tmp_path)
    write(tmp_path, mixtral())
    assert "give the path of one of them" in fault(tmp_path)


def test_any_file_by_its_path(tmp_path: Path) -> None:
    """A single shard that holds the whole layer is a checkpoint too."""
    save_file(mixtral(), tmp_path / "model-00002-of-00009.safetensors")
    source = open_checkpoint(tmp_path / "model-00002-of-00009.safetensors", 0, "mixtral", PLAIN)
    assert torch.equal(source.router_EH, mixtral()[GATE_NAME])


def test_files_are_not_opened_before_they_are_needed(tmp_path: Path) -> None:
    """One layer of a checkpoint of a hundred files maps the files of that layer alone."""
    files = CheckpointFiles(indexed(tmp_path, "gone.safetensors"))
    assert files.stored(EXPERT_NAMES["w1"].format(e=0)).shape == (INTERMEDIATE, HIDDEN)
    with pytest.raises(UsageValueError, match=r"gone\.safetensors: no such file"):
        files.stored(GATE_NAME)


def test_unknown_namings_show_the_known_ones() -> None:
    """Names and families alike."""
    words = r"unknown naming or family 'mixtrel'; known: mixtral \(mixtral, .*gpt_oss"
    with pytest.raises(UsageValueError, match=words):
        find_naming("mixtrel")


def test_a_naming_of_ones_own(tmp_path: Path) -> None:
    """A naming is a value: a family that is not in the file needs no change here."""
    layout = Layout(order="in_out", gate_up="merged", gate_first=False)
    own = Naming("own", ("own",), "this test", "l{layer}.", layout, layout,
                 {"w13": "moe.up_gate", "w2": "moe.down", "router_EH": "moe.r"})
    up_gate = torch.arange(6.0 * 12 * 16).reshape(6, 12, 16)
    path = write(tmp_path, {"l3.moe.up_gate": up_gate, "l3.moe.down": torch.zeros(6, 8, 12),
                            "l3.moe.r": torch.zeros(6, 12)})
    w13_GIH = open_checkpoint(path, 3, own, PLAIN, Parallel(tp=2), 1).expert(5).w13_GIH
    assert torch.equal(w13_GIH, torch.stack([up_gate[5, :, 12:].T, up_gate[5, :, 4:8].T]))


@pytest.mark.parametrize(("change", "words"), [
    ({"tensors": {"w13": "moe.w13"}}, "w13 is no tensor of its layouts"),
    ({"tensors": {"router_EH": "moe.{e}.gate"}}, "has an expert number, but holds no single expert"),
    ({"layer": "model.layers"}, "should hold {layer} and end with a dot"),
    ({"unit_axes": frozenset({"selection_bias_E"})}, "has a unit axis, but no name"),
])
def test_namings_without_a_meaning(change: dict, words: str) -> None:
    """Data is checked where it is read, not where it first goes wrong."""
    layout = Layout(order="out_in", gate_up="separate", stacked=False)
    options = {"name": "n", "families": ("n",), "source": "here", "layer": "layers.{layer}.", "experts": layout,
               "shared": layout, "tensors": {}}
    with pytest.raises(UsageValueError, match=words):
        Naming(**{**options, **change})


def test_name_ranges() -> None:
    """Nothing is left out and nothing is put in: runs of numbers are joined, gaps are kept."""
    assert name_ranges(["a.2.w", "a.0.w", "a.1.w", "a.5.w", "b", "a.1.v", "x_7.w", "x_8.w"]) == [
        "a.1.v", "a.{0-2}.w", "a.5.w", "b", "x_{7-8}.w"]
