"""CUDA graphs of the fast layer: captured once, replayed with other tokens and choices, equal to eager calls.

usage: python ci/graphs.py [--eager] [--deadline SECONDS] [--record FOLDER]. With --eager the calls alone, for
compute-sanitizer. FOLDER/graphs.jsonl: a line per layer that was run, with its faults.
"""

import gc
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path

import click
import torch

import moe_fast
from moe_ref.contract.case_id import parse_case
from moe_ref.inputs.build import build_inputs
from moe_ref.inputs.shards import build_shards

CASES = {
    "v1-T1.H256.I128.E8.K2-bf16-norm": "a decode step: one kernel groups the rows",
    "v1-T64.H256.I128.E8.K2-bf16-norm": "a small batch",
    "v1-T300.H200.I136.E16.K4-fp16-sigmoid-norm-bias-g4.2-top2sum-scale2.5-sh64-shgate":
        "groups, a shared expert with a gate, widths that 16 does not divide",
    "v1-T128.H128.I96.E8.K2-fp32-norm-cap40-mlpbias-outbias": "a capacity and biases, in fp32",
    "v1-T40000.H64.I48.E8.K2-bf16-norm": "more rows than a chunk",
}
Results = dict[str, torch.Tensor]
Call = Callable[[], Results]
Captured = tuple[Callable[[], object], Results]
"""What replays, and the tensors that it writes."""

WARM_CALLS = 3


@dataclass(frozen=True)
class Given:
    """What changes from call to call: tokens, logits, which choose the experts, and the gradient of the result."""

    x_TH: torch.Tensor
    logits_TE: torch.Tensor
    grad_TH: torch.Tensor

    def set(self, other: "Given") -> None:
        """Take the numbers of another one, at the same addresses."""
        with torch.no_grad():
            for field in fields(self):
                getattr(self, field.name).copy_(getattr(other, field.name))


def draws(case_id: str, device: str) -> list[Given]:
    """Random choices, the same experts for every token, and each token's choices one further."""
    problem = parse_case(case_id).problem
    x_TH = build_inputs(problem).x_TH.to(device)
    (num_tokens, _), num_experts = x_TH.shape, problem.spec.num_experts
    generator = torch.Generator().manual_seed(num_tokens)
    random_TE = torch.randn(num_tokens, num_experts, generator=generator)
    same_TE = -torch.arange(float(num_experts)).expand(num_tokens, -1)
    tokens = (x_TH, x_TH.flip(0) * 0.5, -x_TH)
    return [Given(one_TH, logits_TE.to(device), one_TH.roll(1, 1) * 0.5)
            for one_TH, logits_TE in zip(tokens, (random_TE, same_TE, random_TE.roll(1, 1)), strict=True)]


def layer_call(case_id: str, device: str) -> tuple[Given, Call]:
    """The tensors that a call reads, and the call: output and gradients, by name."""
    case = parse_case(case_id)
    first = draws(case_id, device)[0]
    given = replace(first, x_TH=first.x_TH.clone().requires_grad_(), logits_TE=first.logits_TE.clone().requires_grad_(),
                    grad_TH=first.grad_TH.clone())
    weights = build_shards(case.problem, case.parallel, device)[0]
    leaves = {"x_TH": given.x_TH, "logits_TE": given.logits_TE}
    leaves |= {name: tensor.requires_grad_() for name, tensor in weights.named_tensors() if "selection" not in name}

    def call() -> Results:
        y_TH = moe_fast.moe(given.x_TH, weights, case.problem.spec, logits_TE=given.logits_TE)
        # With logits given the router has no gradient.
        found = torch.autograd.grad(y_TH, list(leaves.values()), given.grad_TH, allow_unused=True)
        gradients = {f"grad_{name}": one for name, one in zip(leaves, found, strict=True) if one is not None}
        return {"y_TH": y_TH.detach(), **gradients}

    return given, call


def replay_faults(case_id: str, device: str, capture: Callable[[Call], Captured]) -> list[str]:
    """Every result of every replay that differs from its eager call: a sentence each."""
    given, call = layer_call(case_id, device)
    drawn, wanted = draws(case_id, device), list[Results]()
    for one in drawn:
        given.set(one)
        wanted.append({name: tensor.clone() for name, tensor in call().items()})
    assert not torch.equal(wanted[0]["y_TH"], wanted[1]["y_TH"]), "draws that give the same prove nothing"
    replay, results = capture(call)
    faults = []
    for place in (*range(len(drawn)), *reversed(range(len(drawn)))):
        given.set(drawn[place])
        replay()
        faults += [f"{case_id}: draw {place}: {int((results[name] != one).sum())} of {one.numel()} elements of {name} "
                   "differ from the eager call" for name, one in wanted[place].items()
                   if not torch.equal(results[name], one)]
    return faults


def captured(call: Call) -> Captured:
    """On a stream of its own after calls that compile, as torch asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_CALLS):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph.replay, results


def memory_faults(case_id: str) -> list[str]:
    """A replay allocates nothing, and what a graph has held is given back with it."""
    _, call = layer_call(case_id, "cuda")
    call()
    _collect()
    before = torch.cuda.memory_allocated()
    replay, results = captured(call)
    allocations = torch.cuda.memory_stats()["allocation.all.allocated"]
    for _ in range(WARM_CALLS):
        replay()
    faults = []
    if more := torch.cuda.memory_stats()["allocation.all.allocated"] - allocations:
        faults.append(f"{case_id}: {WARM_CALLS} replays made {more} allocations, but should make none")
    del replay, results
    _collect()
    if left := torch.cuda.memory_allocated() - before:
        faults.append(f"{case_id}: {left} bytes are still allocated after the graph, but should be 0")
    return faults


def _collect() -> None:
    torch.cuda.synchronize()
    gc.collect()


@click.command()
@click.option("--eager", is_flag=True, help="Calls alone, nothing is captured or compared.")
@click.option("--deadline", type=float, default=600.0, show_default=True, help="Start no case after so many seconds.")
@click.option("--record", type=click.Path(path_type=Path, file_okay=False), help="Folder for graphs.jsonl.")
def main(eager: bool, deadline: float, record: Path | None) -> None:
    """Exit code 1 with a sentence per fault; cases that the deadline left out are counted."""
    if not torch.cuda.is_available():
        raise click.ClickException("no CUDA device here, and a CPU has no graphs")
    started, faults, num_run = time.monotonic(), list[str](), 0
    for case_id in CASES:
        if time.monotonic() - started > deadline:
            break
        before = len(faults)
        if eager:
            given, call = layer_call(case_id, "cuda")
            for one in draws(case_id, "cuda"):
                given.set(one)
                call()
            torch.cuda.synchronize()
        else:
            faults += replay_faults(case_id, "cuda", captured) + memory_faults(case_id)
        num_run += 1
        if record is not None:
            record.mkdir(parents=True, exist_ok=True)
            with (record / "graphs.jsonl").open("a") as file:
                file.write(json.dumps({"case": case_id, "eager": eager, "faults": faults[before:]}) + "\n")
        click.echo(f"{case_id}: {CASES[case_id]}, {time.monotonic() - started:.0f} s")
    click.echo("\n".join(faults))
    click.echo(f"{'FAIL' if faults else 'PASS' if num_run else 'NOT RUN'}  {num_run} of {len(CASES)} cases")
    sys.exit(1 if faults or not num_run else 0)


if __name__ == "__main__":
    main()
