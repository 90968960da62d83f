"""Layers whose tensors have more than 2^31 elements, forward and backward, every element against torch, bit for bit.

Tokens, weights and gradients are small integers, mostly zero, so that every sum is exact in any order and only the
results are rounded, once: there is no tolerance, and the reference is a plain formula in fp64, expert by expert. A
defect of the catalogue can be seeded, which must show.

usage: python -m ci.large_shapes NAME... [--device cuda] [--elements N] [--mutant ID] [--record FOLDER]
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import torch

import moe_fast
from ci.large_layers import REFERENCE_BYTES, SHAPES, Layer, Sizes, build_layer, needed_bytes
from moe_ref.bench.memory import free_bytes
from moe_ref.contract.case_id import parse_case
from moe_ref.contract.trace import Trace
from moe_ref.contract.vocabulary import Stage

ROOT = Path(__file__).resolve().parents[1]
LARGE = 2**31
NOT_RUN = 4
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Part:
    """Some rows of one expert: slots, tokens, weights, and what the formulas give, in fp64."""

    slot_R: torch.Tensor
    token_R: torch.Tensor
    weights_R1: torch.Tensor
    gate_RI: torch.Tensor
    up_RI: torch.Tensor
    grad_act_RI: torch.Tensor


def parts(layer: Layer, e: int) -> Iterator[Part]:
    """An expert's rows, as many at a time as fit."""
    w13_GIH, w2_HI = layer.weights.w13_EGIH[e].double(), layer.weights.w2_EHI[e].double()
    at_once = max(1, REFERENCE_BYTES // (8 * (6 * w2_HI.shape[1] + 3 * w2_HI.shape[0])))
    for slot_R in (layer.routing.ids_TK.flatten() == e).nonzero().flatten().split(at_once):
        token_R = slot_R // layer.routing.ids_TK.shape[1]
        x_RH, grad_RH = layer.x_TH[token_R].double(), layer.grad_TH[token_R].double()
        weights_R1 = layer.routing.weights_TK.flatten()[slot_R, None].double()
        yield Part(slot_R, token_R, weights_R1, x_RH @ w13_GIH[0].T, x_RH @ w13_GIH[1].T, grad_RH @ w2_HI)


def _exact(tensor: torch.Tensor) -> torch.Tensor:
    """In bf16; asserts that nothing is lost, without which any order of sums would not do."""
    rounded = tensor.to(torch.bfloat16)
    assert torch.equal(rounded.double(), tensor), "a number between the products that bf16 does not hold"
    return rounded


class Faults:
    """Differences by name of a tensor: how many elements, and where the first and the last are."""

    def __init__(self) -> None:
        self.words: list[str] = []

    def compare(self, name: str, found: torch.Tensor, wanted: torch.Tensor, where: str) -> None:
        """Bit for bit but for the sign of zero."""
        if len(self.words) >= 20:
            return
        differs = found != wanted
        if count := int(differs.sum()):
            places = differs.flatten().nonzero().flatten()
            self.words.append(f"{name}: {count} of {differs.numel()} elements differ, {where}, from place "
                              f"{int(places[0])} to {int(places[-1])}")


def check_forward(layer: Layer, shown: Tensors, y_TH: torch.Tensor, faults: Faults) -> None:
    """Act and down of every row, and the merged tokens of the traced and the untraced call."""
    experts, top_k = len(layer.weights.w2_EHI), layer.routing.ids_TK.shape[1]
    for e in range(experts):
        for part in parts(layer, e):
            act_RI = part.gate_RI.relu() * part.up_RI
            down_RH = act_RI @ layer.weights.w2_EHI[e].double().T * part.weights_R1
            faults.compare("act", shown["act"][part.slot_R], _exact(act_RI), f"expert {e}")
            faults.compare("down", shown["down"][part.slot_R], _exact(down_RH), f"expert {e}")
    # Of rows that are right; where they are not, that has been said.
    at_once = max(1, REFERENCE_BYTES // (8 * top_k * y_TH.shape[1]))
    for start in range(0, len(y_TH), at_once):
        some_RH = shown["down"][start * top_k:(start + at_once) * top_k]
        wanted_TH = some_RH.double().view(-1, top_k, y_TH.shape[1]).sum(1).to(y_TH.dtype)
        for name, found_TH in (("merged", shown["merged"]), ("result without a trace", y_TH)):
            faults.compare(name, found_TH[start:start + at_once], wanted_TH, f"tokens from {start}")


def check_backward(layer: Layer, found: Tensors, faults: Faults) -> None:
    """Gradients of tokens, routing weights and both matrices of every expert."""
    grad_x_TH = torch.zeros(layer.x_TH.shape, dtype=torch.float32, device=layer.x_TH.device)
    for e in range(len(layer.weights.w2_EHI)):
        w13_GIH, w2_HI = layer.weights.w13_EGIH[e].double(), layer.weights.w2_EHI[e].double()
        grad_w13_GIH, grad_w2_HI = torch.zeros_like(w13_GIH), torch.zeros_like(w2_HI)
        for part in parts(layer, e):
            act_RI, grad_act_RI = part.gate_RI.relu() * part.up_RI, part.grad_act_RI * part.weights_R1
            grad_gate_RI, grad_up_RI = grad_act_RI * part.up_RI * (part.gate_RI > 0), grad_act_RI * part.gate_RI.relu()
            row_RH = _exact(grad_gate_RI @ w13_GIH[0] + grad_up_RI @ w13_GIH[1])
            grad_x_TH.index_add_(0, part.token_R, row_RH.float())
            x_RH, grad_RH = layer.x_TH[part.token_R].double(), layer.grad_TH[part.token_R].double()
            grad_w13_GIH += torch.stack([grad_gate_RI.T @ x_RH, grad_up_RI.T @ x_RH])
            grad_w2_HI += grad_RH.T @ (act_RI * part.weights_R1)
            grad_weights_R = (part.grad_act_RI * act_RI).sum(1).float()
            faults.compare("grad_weights", found["weights_TK"].flatten()[part.slot_R], grad_weights_R, f"expert {e}")
        faults.compare("grad_w13", found["w13_EGIH"][e], grad_w13_GIH.to(torch.bfloat16), f"expert {e}")
        faults.compare("grad_w2", found["w2_EHI"][e], grad_w2_HI.to(torch.bfloat16), f"expert {e}")
    at_once = max(1, REFERENCE_BYTES // (4 * grad_x_TH.shape[1]))
    for start in range(0, len(grad_x_TH), at_once):
        wanted_TH = grad_x_TH[start:start + at_once].to(torch.bfloat16)
        faults.compare("grad_x", found["x_TH"][start:start + at_once], wanted_TH, f"tokens from {start}")


def run_shape(sizes: Sizes, device: str) -> list[str]:
    """What is wrong, in words."""
    spec = parse_case(f"v1-T1.H{sizes.hidden}.I{sizes.intermediate}.E{sizes.experts}.K{sizes.top_k}-bf16-norm-relu"
                      ).problem.spec
    layer, faults = build_layer(sizes, device), Faults()
    trace = Trace()
    with torch.no_grad():
        moe_fast.experts(layer.x_TH, layer.routing, layer.weights, spec, trace=trace)
        y_TH = moe_fast.experts(layer.x_TH, layer.routing, layer.weights, spec)
    shown = {str(stage): trace.tensors.pop(stage) for stage in (Stage.ACT, Stage.DOWN, Stage.MERGED)}
    check_forward(layer, shown, y_TH, faults)
    shown.clear()
    leaves = {"x_TH": layer.x_TH, "weights_TK": layer.routing.weights_TK, "w13_EGIH": layer.weights.w13_EGIH,
              "w2_EHI": layer.weights.w2_EHI}
    for tensor in leaves.values():
        tensor.requires_grad_()
    y_TH = moe_fast.experts(layer.x_TH, layer.routing, layer.weights, spec)
    gradients = torch.autograd.grad(y_TH, list(leaves.values()), layer.grad_TH)
    with torch.no_grad():
        check_backward(layer, dict(zip(leaves, gradients, strict=True)), faults)
    return faults.words


def _judged(name: str, elements: int, device: str) -> tuple[int, str]:
    """The exit code and the verdict in words."""
    sizes = SHAPES[name].sizes(elements, elements < LARGE)
    words = (f"{SHAPES[name].what}: T {sizes.tokens}, H {sizes.hidden}, I {sizes.intermediate}, E {sizes.experts}, "
             f"K {sizes.top_k}")
    try:
        needed, free = needed_bytes(sizes), free_bytes(device)
        if needed > free:
            return NOT_RUN, (f"NOT RUN  {words}: needs about {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are "
                             "free")
        faults = run_shape(sizes, device)
    except Exception as error:
        faults = [f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"]
    if faults:
        return 1, "\n".join([*faults, f"FAIL  {words}: {faults[0]}"])
    return 0, f"PASS  {words}: every element of rows, results and gradients"


def _mutant(name: str, elements: int, device: str, mutant: str) -> tuple[int, str]:
    """The same with a seeded copy of what is judged, in a process of its own, which a device error may end."""
    from moe_ref.score.load import load_catalogue
    from moe_ref.score.seed import seed

    patches = next(one.patches for one in load_catalogue(ROOT / "tests" / "catalogue").mutants if one.id == mutant)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    with tempfile.TemporaryDirectory(prefix="moe-ref-") as copy:
        seed(patches, Path(copy))
        # The current folder comes first on the path.
        done = subprocess.run([sys.executable, "-m", "ci.large_shapes", name, "--device", device, "--elements",
                               str(elements)], cwd=copy, env=os.environ | {"PYTHONPATH": path}, capture_output=True,
                              text=True, check=False)
    said = next((line for line in reversed(done.stdout.splitlines()) if line.strip()), "")
    if done.returncode < 0 or (done.returncode == 1 and said.startswith("FAIL")):
        return 0, f"CAUGHT  {mutant} in {name}: {said or f'ended by signal {-done.returncode}'}"
    if done.returncode == 0:
        return 1, f"MISSED  {mutant} in {name}: {said}"
    return (NOT_RUN, said) if done.returncode == NOT_RUN else (3, f"BROKEN  {mutant}: {done.stderr[-500:]}")


@click.command()
@click.argument("names", metavar="NAME...", nargs=-1, required=True, type=click.Choice(list(SHAPES)))
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cuda", show_default=True)
@click.option("--elements", type=click.IntRange(2**12), default=LARGE, show_default=True, help="More than so many.")
@click.option("--mutant", help="A defect of the catalogue, which must show.")
@click.option("--record", type=click.Path(path_type=Path, file_okay=False),
              help="Folder for verdicts; one that is there is shown again.")
def main(names: tuple[str, ...], device: str, elements: int, mutant: str | None, record: Path | None) -> None:
    """Exit code 0 where all is right, or the defect is caught; 1 otherwise; 3 broken; 4 it does not fit into memory.

    After a fault of the device no other shape can run in the process: on a GPU give one NAME.
    """
    codes = []
    for name in names:
        path = record / f"{mutant or name}.json" if record else None
        kept = json.loads(path.read_text()) if path and path.exists() else {}
        began = time.monotonic()
        if not kept:
            code, said = _mutant(name, elements, device, mutant) if mutant else _judged(name, elements, device)
            kept = {"shape": name, "mutant": mutant or "", "elements": elements, "device": device, "exit_code": code,
                    "said": said, "seconds": round(time.monotonic() - began, 1)}
            if path and code in (0, 1):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(kept))
        click.echo(kept["said"])
        codes.append(kept["exit_code"])
    sys.exit(max(codes))


if __name__ == "__main__":
    main()
