"""A case or a model in words."""

import math
from dataclasses import asdict

from moe_ref.contract.case import Case
from moe_ref.contract.case_id import format_case
from moe_ref.contract.features import features_of
from moe_ref.contract.parallel import PLACEMENTS, Parallel
from moe_ref.contract.spec import MoESpec
from moe_ref.contract.vocabulary import Dtype, Storage
from moe_ref.models.registry import Model
from moe_ref.models.words import mlp_formula, numerics_words, router_steps, shared_words

_BYTES = {Dtype.FP32: 4, Dtype.FP16: 2, Dtype.BF16: 2}

Lines = list[tuple[str, str]]


def model_row(model: Model) -> dict[str, object]:
    """One line of `list --models`: name, family, title, features beyond a plain layer, source."""
    return {"model": model.name, "family": model.family.name, "title": model.title,
            "features": sorted(features_of(model.spec)), "routing": model.routing, "source": model.source}


def model_document(model: Model, tp: int = 1) -> dict[str, object]:
    """Everything that `show MODEL --json` prints; shapes are those of each of `tp` ranks."""
    whole = _shapes(model.spec, Parallel(), 0)
    numbers = {name: math.prod(shape) for name, shape in whole.items()}
    experts = sum(number for name, number in numbers.items() if name.startswith(("w13", "w2")))
    used = experts // model.spec.num_experts * model.spec.top_k
    return model_row(model) | {
        "spec": asdict(model.spec), "reason": model.reason, "numerics": asdict(model.numerics),
        "numerics_read_in": model.family.code, "numerics_note": model.family.note,
        "parameters": [{name: list(shape) for name, shape in _shapes(model.spec, Parallel(tp=tp), rank).items()}
                       for rank in range(tp)],
        "parameter_count": sum(numbers.values()), "active_parameters": sum(numbers.values()) - experts + used,
        "bytes_bf16": 2 * sum(numbers.values()), "beside_source": list(model.beside_source), "note": model.note,
        "case": f"v1-{model.name}.T32-bf16" + (f"-tp{tp}" if tp > 1 else "")}


def describe_model(model: Model, tp: int = 1) -> Lines:
    """Family, mathematics step by step, shapes per rank, released numerics, sizes, source and note."""
    document = model_document(model, tp)
    count, active = document["parameter_count"], document["active_parameters"]
    assert isinstance(count, int)
    assert isinstance(active, int)
    lines = [("model", f"{model.name}: {model.title}"), ("family", model.family.name)]
    if model.reason:
        lines.append(("routing", f"to be injected: {model.reason}"))
    lines += _mathematics(model.spec)
    lines += [(f"rank {rank}", _shape_words(_shapes(model.spec, Parallel(tp=tp), rank))) for rank in range(tp)]
    lines += [("parameters", f"{count / 1e9:.3f} G, {active / 1e6:.0f} M of them used by a token at most; "
                             f"{2 * count / 2**30:.2f} GiB in bf16"),
              ("released code", "; ".join(numerics_words(model.numerics))
               + (f" ({model.family.note})" if model.family.note else "")),
              ("read in", model.family.code), ("source", model.source)]
    lines += [("beside it", ", ".join(model.beside_source))] * bool(model.beside_source)
    return [*lines, ("note", model.note or "none"), ("case", str(document["case"]))]


def _shapes(spec: MoESpec, parallel: Parallel, rank: int) -> dict[str, tuple[int, ...]]:
    # The module of the weights imports torch, which `list` and `--help` do without.
    from moe_ref.contract.weights import parameter_shapes
    return parameter_shapes(spec, parallel, rank)


def _shape_words(shapes: dict[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in shapes.items())


def _mathematics(spec: MoESpec) -> Lines:
    lines = [("sizes", f"hidden {spec.hidden_size}, intermediate {spec.intermediate_size}, "
                       f"experts {spec.num_experts}, top-k {spec.top_k}")]
    steps = router_steps(spec.router) if spec.router else ["None: a dense MLP, weight 1."]
    lines += [(f"router {number}" if len(steps) > 1 else "router", step) for number, step in enumerate(steps, 1)]
    where = ", with weight * x for x" if spec.weight_on == "input" else ""
    lines.append(("experts", mlp_formula(spec.experts) + where))
    if spec.shared:
        lines.append(("shared", shared_words(spec.shared)))
    lines += [("output", "a bias is added to the merged result")] * spec.output_bias
    return lines


def describe_case(case: Case) -> Lines:
    """Mathematics, inputs, shapes per stage and rank, placements, communication and bounds of one case."""
    problem, spec, parallel = case.problem, case.problem.spec, case.parallel
    tokens = problem.num_tokens
    lines = [("case", format_case(case))] + [("model", problem.model)] * bool(problem.model)
    lines += [*_mathematics(spec), ("tokens", str(tokens)), ("dtype", problem.dtype.value),
              ("inputs", f"pattern {problem.pattern}, data {problem.data}, seed {problem.seed}"
                         + (", a residual added once" if problem.residual else ""))]
    lines += _ranks(spec, parallel, tokens)
    lines += [("storage", f"{case.storage}: strided views of that order")] * (case.storage is not Storage.OUT_IN)
    lines.append(("placements", ", ".join(f"{name} {PLACEMENTS[name].kind}"
                                          for name in _shapes(spec, parallel, 0))))
    elements = tokens * spec.hidden_size
    lines.append(("communication", "none" if parallel.tp == 1 else
                  f"one all_reduce of {elements} elements, {elements * _BYTES[problem.dtype]} bytes per rank"))
    return lines + _bounds(case)


def _ranks(spec: MoESpec, parallel: Parallel, tokens: int) -> Lines:
    rows, lines = tokens * spec.top_k, []
    for rank, (start, stop) in enumerate(parallel.ranges(spec.intermediate_size)):
        rows_words = f"act ({rows}, {stop - start}), down ({rows}, {spec.hidden_size})"
        lines.append((f"rank {rank}", f"columns [{start}, {stop}) of intermediate: "
                                      f"{_shape_words(_shapes(spec, parallel, rank))}; {rows_words}, "
                                      f"merged ({tokens}, {spec.hidden_size})"))
    return lines


def _bounds(case: Case) -> Lines:
    spec, dtype = case.problem.spec, case.problem.dtype
    inner = max(stop - start for start, stop in case.parallel.ranges(spec.intermediate_size))
    return [
        ("bound act", f"from x: gamma(K={spec.hidden_size}) = {spec.hidden_size * 2.0**-24:.2e} of the sum of "
                      f"absolute products of gate and up, through the activation, plus one store in {dtype}"),
        ("bound down", f"from act: gamma(K={inner}) = {inner * 2.0**-24:.2e} of the sum of absolute products, "
                       f"times the weight, plus one store in {dtype}"),
        ("bound merged", f"from down: {spec.top_k + (spec.shared is not None)} rows summed in fp32, one store"),
        ("bound reduced", f"from merged: {case.parallel.tp - 1} additions between ranks, each rounded"),
        ("bound output", "all of these propagated, against the unsharded fp64 oracle; derivation in "
                         "docs/bounds.md"),
    ]
