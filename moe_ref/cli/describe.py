"""A case or a model in words. Imports no torch."""

from moe_ref.contract.case import Case
from moe_ref.contract.case_id import format_case
from moe_ref.contract.parallel import PLACEMENTS
from moe_ref.contract.spec import MoESpec, Router
from moe_ref.contract.vocabulary import Dtype
from moe_ref.models.registry import Model

_BYTES = {Dtype.FP32: 4, Dtype.FP16: 2, Dtype.BF16: 2}

Lines = list[tuple[str, str]]


def describe_model(model: Model) -> Lines:
    """Title, source, the layer's mathematics, its parameters and what the spec leaves out."""
    spec = model.spec
    per_expert = 3 * spec.hidden_size * spec.intermediate_size
    return [("model", f"{model.name}: {model.title}"), ("source", model.source), *_mathematics(spec),
            ("parameters", f"{per_expert / 1e6:.1f} M per expert, {per_expert * spec.num_experts / 1e9:.2f} G in all "
                           f"experts, {per_expert * spec.top_k / 1e6:.0f} M active per token"),
            ("left out", model.note or "nothing"), ("case", f"v1-{model.name}.T32-bf16-tp8")]


def _mathematics(spec: MoESpec) -> Lines:
    lines = [("sizes", f"hidden {spec.hidden_size}, intermediate {spec.intermediate_size}, "
                       f"experts {spec.num_experts}, top-k {spec.top_k}"),
             ("router", _router(spec.router) if spec.router else "none: a dense gated MLP"),
             ("experts", f"w2 @ ({spec.experts.activation}(w1 @ x) * (w3 @ x))")]
    if spec.shared:
        gate = ", times sigmoid(gate @ x)" if spec.shared.gate == "sigmoid" else ""
        lines.append(("shared", f"intermediate {spec.shared.intermediate_size}, {spec.shared.mlp.activation}{gate}"))
    return lines


def _router(router: Router) -> str:
    words = [f"{router.score} of the logits"]
    if router.selection_bias:
        words.append("a bias for selection only")
    if router.num_groups > 1:
        words.append(f"the {router.num_groups_kept} best of {router.num_groups} groups by {router.group_score}")
    words.append(f"top {router.top_k}, ties to the lower id")
    if router.renormalize:
        epsilon = f" + {router.renormalize_epsilon:g}" if router.renormalize_epsilon else ""
        words.append(f"divided by their sum{epsilon}")
    if router.scaling_factor != 1:
        words.append(f"times {router.scaling_factor:g}")
    return "; ".join(words)


def describe_case(case: Case) -> Lines:
    """Mathematics, inputs, shapes per stage and rank, placements, communication and bounds of one case."""
    problem, spec, parallel = case.problem, case.problem.spec, case.parallel
    tokens, rows = problem.num_tokens, problem.num_tokens * spec.top_k
    lines = [("case", format_case(case))]
    if problem.model:
        lines.append(("model", problem.model))
    lines += [*_mathematics(spec), ("tokens", str(tokens)), ("dtype", problem.dtype.value),
              ("inputs", f"pattern {problem.pattern}, data {problem.data}, seed {problem.seed}"
                         + (", a residual added once" if problem.residual else ""))]
    for rank, (start, stop) in enumerate(parallel.ranges(spec.intermediate_size)):
        width = stop - start
        lines.append((f"rank {rank}", f"columns [{start}, {stop}) of intermediate: w13 ({spec.num_experts}, 2, "
                                      f"{width}, {spec.hidden_size}), w2 ({spec.num_experts}, {spec.hidden_size}, "
                                      f"{width}); "
                                      f"act ({rows}, {width}), down ({rows}, {spec.hidden_size}), "
                                      f"merged ({tokens}, {spec.hidden_size})"))
    absent = () if spec.shared else ("shared_w13_GIH", "shared_w2_HI", "shared_gate_SH")
    absent += () if spec.router else ("router_EH", "selection_bias_E")
    lines.append(("placements", ", ".join(f"{name} {placement.kind}" for name, placement in PLACEMENTS.items()
                                          if name not in absent)))
    elements = tokens * spec.hidden_size
    lines.append(("communication", "none" if parallel.tp == 1 else
                  f"one all_reduce of {elements} elements, {elements * _BYTES[problem.dtype]} bytes per rank"))
    return lines + _bounds(case)


def _bounds(case: Case) -> Lines:
    spec, dtype = case.problem.spec, case.problem.dtype
    inner = max(stop - start for start, stop in case.parallel.ranges(spec.intermediate_size))
    return [
        ("bound act", f"from x: gamma(K={spec.hidden_size}) = {spec.hidden_size * 2.0**-24:.2e} of the sum of absolute "
                      f"products of gate and up, through the activation, plus one store in {dtype}"),
        ("bound down", f"from act: gamma(K={inner}) = {inner * 2.0**-24:.2e} of the sum of absolute products, times "
                       f"the weight, plus one store in {dtype}"),
        ("bound merged", f"from down: {spec.top_k + (spec.shared is not None)} rows summed in fp32, one store"),
        ("bound reduced", f"from merged: {case.parallel.tp - 1} additions between ranks, each rounded"),
        ("bound output", "all of these propagated, against the unsharded fp64 oracle; derivation in docs/bounds.md"),
    ]
