"""ci/layout_copies.py at a size that takes no time: what it says, not how long anything took."""

import torch
from click.testing import CliRunner

from ci import layout_copies
from ci.layout_copies import SHAPES, Sizes, bf16_product, even_ends, in_fp8, lines

SMALL = Sizes(experts=3, hidden=64, intermediate=32)


def test_a_view_and_its_copy_are_one_product() -> None:
    """Asserted inside; bytes are those of bf16."""
    found = bf16_product(torch.rand(3, 48, 64, dtype=torch.bfloat16), torch.rand(10, 64, dtype=torch.bfloat16),
                         even_ends(10, 3, "cpu"))
    assert (found.weight_bytes, found.product_bytes) == (2 * 3 * 48 * 64, 2 * (3 * 48 * 64 + 10 * 64 + 10 * 48))
    assert 0 < found.share < 1
    assert found.ratio > 0


def test_rows_are_shared_out_and_none_is_lost() -> None:
    assert even_ends(10, 3, "cpu").tolist() == [3, 6, 10]


def test_what_a_cpu_cannot_run_says_so() -> None:
    """torch has no scaled grouped product there."""
    found = list(lines("small", SMALL, 16, "cpu"))
    assert [line.split()[2] + " " + line.split()[3] for line in found] == [
        "gate_up bf16", "gate_up fp8", "down bf16", "down fp8"]
    assert [line.endswith("not run: needs CUDA") for line in found] == [False, True, False, True]


def test_codes_under_their_scales_are_the_matrix() -> None:
    """To half a unit of e4m3, relative to the row's largest."""
    matrix = torch.linspace(-3, 5, 96).view(2, 3, 16).to(torch.bfloat16)
    codes, scales = in_fp8(matrix)
    largest = matrix.float().abs().amax(-1, keepdim=True)
    assert float(((codes.float() * scales[..., None] - matrix.float()) / largest).abs().max()) <= 2**-4


def test_what_does_not_fit_is_not_run(monkeypatch) -> None:
    monkeypatch.setattr(layout_copies, "free_bytes", lambda device: 2**20)
    done = CliRunner().invoke(layout_copies.main, ["--shape", "mixtral.8x7b", "--experts", "2"])
    assert done.exit_code == 0
    assert done.output.count("not run: needs 1.3 GiB") == 1
    assert SHAPES["mixtral.8x7b"].products == {"gate_up": (28672, 4096), "down": (4096, 14336)}
