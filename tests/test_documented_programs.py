"""Python that documents show: what it imports exists, and what needs no other machine runs as it stands."""

import ast
import os
import threading
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file

import moe_ref
from moe_ref import MoELayer, MoESpec, Parallel, Router, grid_groups, run_virtual_ranks
from tests.documents import ROOT, Block, blocks

PROGRAMS = [block for block in blocks("python") if not block.text.startswith(("# mypkg/", "# test_"))]
SPEC = MoESpec(hidden_size=16, intermediate_size=24, router=Router(num_experts=8, top_k=2, renormalize=True))
"""A small layer in the place of Mixtral's, whose checkpoint is 90 GB."""


def imports(block: Block) -> Iterator[tuple[str, str]]:
    """(module, name) of everything that is imported by name."""
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom):
            yield from ((str(node.module), one.name) for one in node.names)


@pytest.mark.parametrize("block", PROGRAMS, ids=lambda block: block.place)
def test_what_is_imported_exists(block: Block) -> None:
    """A name that was renamed sends its reader astray."""
    skip_without_transformers(block.text)
    assert [f"{module}.{one}" for module, one in imports(block) if not hasattr(import_module(module), one)] == []


def skip_without_transformers(text: str) -> None:
    """Skips a program of transformers where a run does without, with the run's reason."""
    if (reason := os.environ.get("MOE_REF_WITHOUT_TRANSFORMERS")) and "from transformers import" in text:
        pytest.skip(f"MOE_REF_WITHOUT_TRANSFORMERS: {reason}")


def program(document: str, word: str) -> str:
    """The one of a document that holds a word."""
    [block] = [block for block in PROGRAMS if block.file == ROOT / document and word in block.text]
    return block.text


def run(text: str, **given: object) -> dict[str, object]:
    """The names that a program leaves; `given` is what the text around it speaks of."""
    names = dict(given)
    exec(compile(text, "a document", "exec"), names)
    return names


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """path/to/Mixtral-8x7B-v0.1 in the current folder, of the small layer's sizes, which find_model gives."""
    folder = tmp_path / "path/to/Mixtral-8x7B-v0.1"
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    hidden, inner = SPEC.hidden_size, SPEC.intermediate_size
    shapes = {"w1": (inner, hidden), "w3": (inner, hidden), "w2": (hidden, inner)}
    tensors = {f"experts.{expert}.{one}.weight": torch.randn(shape) / shape[1]**0.5
               for expert in range(SPEC.num_experts) for one, shape in shapes.items()}
    tensors["gate.weight"] = torch.randn(SPEC.num_experts, hidden)
    save_file({f"model.layers.3.block_sparse_moe.{name}": tensor.bfloat16() for name, tensor in tensors.items()},
              folder / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(moe_ref, "find_model", lambda name: type("Model", (), {"spec": SPEC}))


@pytest.fixture
def on_ranks(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, str], list[dict[str, object]]]:
    """Run a program for torchrun on so many virtual ranks, where TorchComm() is the world."""
    here = threading.local()
    monkeypatch.setattr(moe_ref, "TorchComm", lambda: here.world)
    monkeypatch.setattr(dist, "init_process_group", lambda backend: None)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)

    def call(ranks: int, text: str) -> list[dict[str, object]]:
        def on_each_rank(world: object) -> dict[str, object]:
            here.world = world
            return run(text)
        return run_virtual_ranks(ranks, on_each_rank)
    return call


def test_the_front_page(capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle and kernels differ by what its comment says."""
    run(program("README.md", "fast_moe"))
    assert 0 < float(capsys.readouterr().out.removeprefix("tensor(").partition(",")[0].rstrip(")\n")) < 2**-20


@pytest.mark.usefixtures("checkpoint")
def test_the_oracle_and_its_bound(capsys: pytest.CaptureFixture[str]) -> None:
    """Gradients of every expert, and a right layer within its bound."""
    names = run(program("docs/oracle.md", "moe_backward"))
    assert len(capsys.readouterr().out.splitlines()) == SPEC.num_experts
    run(program("docs/oracle.md", "output_bound"), **names, your_y_TH=names["y_TH"])
    assert float(capsys.readouterr().out.removeprefix("tensor(").partition(",")[0]) < 1


@pytest.mark.usefixtures("checkpoint")
def test_the_oracle_on_many_ranks(on_ranks: Callable[[int, str], list[dict[str, object]]]) -> None:
    """Every rank reads its part of the checkpoint and gets the outputs of its own tokens."""
    results = on_ranks(8, program("docs/oracle.md", "init_process_group"))
    assert [tuple(names["y_TH"].shape) for names in results] == [(5, SPEC.hidden_size)] * 8  # type: ignore[attr-defined]


def test_virtual_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    """It prints what stands beside it, for the published size."""
    text = program("docs/parallel.md", "run_virtual_ranks")
    run(text)
    assert capsys.readouterr().out.strip() in text


def test_a_program_under_torchrun(on_ranks: Callable[[int, str], list[dict[str, object]]],
                                  capsys: pytest.CaptureFixture[str]) -> None:
    """Every rank prints that its outputs are the whole layer's."""
    on_ranks(4, program("docs/parallel.md", "init_process_group"))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert sorted(int(rank) for rank, _ in lines) == [0, 1, 2, 3]
    assert all(float(error) < 1e-12 for _, error in lines)


def test_our_experts_in_a_whole_model(capsys: pytest.CaptureFixture[str]) -> None:
    """A gradient arrives through moe_fast."""
    text = program("docs/adapters.md", "set_experts_implementation")
    skip_without_transformers(text)
    run(text)
    assert capsys.readouterr().out == "True\n"


def test_encoded_weights(capsys: pytest.CaptureFixture[str]) -> None:
    """Each line is printed as its comment says."""
    text = program("docs/quantised.md", "encode(Scheme.MXFP4")
    run(text)
    assert capsys.readouterr().out.splitlines() == [line.partition("  # ")[2] for line in text.splitlines()
                                                    if line.startswith("print")]


@pytest.mark.usefixtures("checkpoint")
def test_checkpoints() -> None:
    """A layer whole, for a rank of eight, and for a rank of a grid."""
    text = program("docs/checkpoints.md", "open_checkpoint")

    def on_each_rank(world: object) -> tuple[int, ...]:
        layer = MoELayer(SPEC, Parallel(ep=4, tp=2), grid_groups(world, tp=2, ep=4))  # type: ignore[arg-type]
        if layer.groups.rank != 5:
            return ()
        return tuple(run(text, layer=layer, x_TH=torch.randn(3, SPEC.hidden_size))["y_TH"].shape)  # type: ignore[attr-defined]
    assert run_virtual_ranks(8, on_each_rank)[5] == (3, SPEC.hidden_size)
