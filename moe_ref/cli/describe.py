"""A case or a model in words."""

import math
from dataclasses import asdict, replace

from moe_ref.contract.case import Case, Problem
from moe_ref.contract.case_id import format_case
from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.features import features_of
from moe_ref.contract.parallel import Parallel
from moe_ref.contract.scheme_words import encoded_words, scheme_words
from moe_ref.contract.shares import rank_shares
from moe_ref.contract.spec import MoESpec
from moe_ref.contract.vocabulary import Data, Direction, Dtype, Schedule, Scheme, Storage, Tokens
from moe_ref.contract.volume import Transfer, additions_between_ranks, transfers
from moe_ref.models.registry import Model
from moe_ref.models.words import mlp_formula, numerics_words, router_steps, shared_words

_BYTES = {Dtype.FP32: 4, Dtype.FP16: 2, Dtype.BF16: 2}

_SHOWN_TOKENS = 32

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
    problem = Problem(spec=model.spec, num_tokens=_SHOWN_TOKENS, dtype=Dtype.BF16, model=model.name)
    lines += [(f"{name}", f"{words}, {_SHOWN_TOKENS} tokens in bf16")
              for name, words in _schedules(Case(problem=problem, parallel=Parallel(tp=tp)), mark=False)] * (tp > 1)
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
                         + (", a residual added once" if problem.residual else "")
                         + (", ids and weights injected, nothing allowed to be off" if _is_exact(case) else ""))]
    if problem.scheme is not Scheme.PLAIN:
        lines.append(("scheme", f"{problem.scheme}: {scheme_words(problem.scheme)}"))
    lines += _grid(case)
    how = "parts of larger tensors" if case.storage is Storage.PADDED else "strided views of that order"
    lines += [("storage", f"{case.storage}: {how}")] * (case.storage is not Storage.OUT_IN)
    lines.append(("placements", ", ".join(_placement_words(name, parallel) for name in _shapes(spec, parallel, 0))))
    return lines + _communication(case) + ([] if _is_exact(case) else [*_bounds(case), *_budget(case)])


def _budget(case: Case) -> Lines:
    """What the output's error is made of under the usual contract, as root mean squares relative to the output."""
    problem = case.problem
    if problem.num_tokens == 0 or problem.data is Data.NON_FINITE or case.direction is Direction.BACKWARD:
        return []
    # It imports torch, which `list` and `--help` do without.
    from moe_ref.verify.budget import LARGEST_CASE, error_budget, is_small, usual_numerics
    if not is_small(case):
        limit = LARGEST_CASE.bit_length() - 1
        return [("error together", f"not computed: more than 2^{limit} products in a projection")]
    numerics = usual_numerics(case)
    budget = error_budget(case, numerics)
    parts = [("weights", budget.decoded, f"decoded weights, rounded to {numerics.decoded}"),
             ("operands", budget.operands, f"rows rounded to 8 bits ({numerics.products})"),
             ("borders", budget.borders, "codes next to a rounding border, which differ in two right layers"),
             ("stores", budget.stores, f"rows stored in {problem.dtype}"), ("sums", budget.accumulation, "long sums"),
             ("ranks", budget.reduction, "additions between ranks")]
    lines = [(f"error {name}", f"{size:.1e} of the output: {what}") for name, size, what in parts if size > 0]
    return [*lines, ("error together", f"{budget.total:.1e} of the output, root mean squares, in the usual contract")]


def _is_exact(case: Case) -> bool:
    return case.problem.data is Data.EXACT


def _grid(case: Case) -> Lines:
    """One line per rank: what it starts from, holds and shows."""
    spec, parallel, lines = case.problem.spec, case.parallel, []
    for share in rank_shares(case):
        (start, stop), (first, last), (low, high) = share.columns, share.tokens, share.merged_tokens
        rows = "its slots" if parallel.ep > 1 else str((high - low) * spec.top_k)
        width = share.outputs[1] - share.outputs[0]
        words = [f"ep {share.ep_rank}, tp {share.tp_rank}, experts {_runs(share.experts)}"] * (parallel.ep > 1)
        words += [f"tokens [{first}, {last})"] * (parallel.tokens is not Tokens.REPLICATED)
        words.append(f"columns [{start}, {stop}) of intermediate: {_held_words(case, share.rank)}; "
                     f"act ({rows}, {stop - start}), down ({rows}, {width}), merged ({high - low}, {width})")
        lines.append((f"rank {share.rank}", ", ".join(words)))
    return lines


def _held_words(case: Case, rank: int) -> str:
    """Shapes of what a rank holds, of encoded matrices those of their codes and scales."""
    shapes = _shapes(case.problem.spec, case.parallel, rank)
    if case.problem.scheme is Scheme.PLAIN:
        return _shape_words(shapes)
    # As in _shapes.
    from moe_ref.contract.quantised import MATRICES, part_starts
    words = []
    for name, shape in shapes.items():
        if name not in MATRICES.values():
            words.append(f"{name} {shape}")
            continue
        rows, columns = part_starts(case, name, rank)
        words.append(f"{name} {encoded_words(case.problem.scheme, shape, rows, columns)}")
    return ", ".join(words)


def _runs(experts: tuple[int, ...]) -> str:
    """Experts with runs of three and more as "4-7"."""
    words: list[str] = []
    run: list[int] = []
    for e in (*experts, -1):
        if run and e == run[-1] + 1:
            run.append(e)
            continue
        words += [f"{run[0]}-{run[-1]}"] if len(run) > 2 else [str(one) for one in run]
        run = [e]
    return " ".join(words) or "none"


def _placement_words(name: str, parallel: Parallel) -> str:
    # As in _shapes: without torch until it is needed.
    from moe_ref.contract.placements import placements
    placement = placements(parallel)[name]
    also = placement.expert_dim is not None and parallel.ep > 1
    return f"{name} {placement.kind}" + " over tp, experts over ep" * also


def _communication(case: Case) -> Lines:
    """What each rank hands to collectives, and how much that is under every schedule."""
    size = _BYTES[case.problem.dtype]
    lines = [(f"sends {rank}", "; ".join(f"{one.name} of {one.num_elements} elements ({one.what})"
                                         + f", {one.num_elements * size} bytes" * (not one.describes)
                                         for one in planned) or "none")
             for rank, planned in enumerate(_planned(case))]
    if len({words for _, words in lines}) == 1:
        lines = [("each rank sends", lines[0][1])]
    if case.parallel.tokens.over_ep:
        lines.append(("rows travel", "counted for even loads; the routing decides how many there are"))
    return lines + _schedules(case)


def _planned(case: Case) -> list[tuple[Transfer, ...]]:
    """The collectives of every rank; of rows that travel to their experts as many as even loads would give."""
    top_k, even = case.problem.spec.top_k, case.problem.num_tokens * case.problem.spec.top_k // case.parallel.ep
    return [transfers(case, share, (share.merged_tokens[1] - share.merged_tokens[0]) * top_k, even)
            for share in rank_shares(case)]


def _schedules(case: Case, mark: bool = True) -> Lines:
    """Calls and bytes of rows per rank, the most that any rank sends, under each schedule that the tokens allow."""
    lines, size = [], _BYTES[case.problem.dtype]
    beside = "" if case.parallel.tokens is Tokens.REPLICATED else " at most, ids and weights not counted"
    for schedule in Schedule:
        try:
            planned = _planned(replace(case, parallel=replace(case.parallel, schedule=schedule)))
        except UsageValueError:
            continue
        calls = [sum(not one.describes for one in ranks) for ranks in planned]
        sent = [size * sum(one.num_elements for one in ranks if not one.describes) for ranks in planned]
        lines.append((schedule.value, f"{max(calls)} call{'s' * (max(calls) != 1)}, {max(sent)} bytes per rank" + beside
                      + " (this case)" * (mark and schedule is case.parallel.schedule)))
    return lines


def _bounds(case: Case) -> Lines:
    spec, dtype = case.problem.spec, case.problem.dtype
    inner = max(stop - start for start, stop in case.parallel.ranges(spec.intermediate_size))
    if case.parallel.schedule is Schedule.GATHER:
        inner = spec.intermediate_size
    rows = case.parallel.schedule is Schedule.ALL_REDUCE_ROWS
    return [
        ("bound act", f"from x: gamma(K={spec.hidden_size}) = {spec.hidden_size * 2.0**-24:.2e} of the sum of "
                      f"absolute products of gate and up, through the activation, plus one store in {dtype}"),
        ("bound down", f"from act: gamma(K={inner}) = {inner * 2.0**-24:.2e} of the sum of absolute products, "
                       f"times the weight, plus one store in {dtype}"),
        ("bound merged", f"from down: {spec.top_k + (spec.shared is not None)} rows summed in fp32, one store"),
        ("bound reduced", f"from {'down' if rows else 'merged'}: {additions_between_ranks(case.parallel)} additions "
                          "between ranks, each rounded"),
        ("bound output", "all of these propagated, against the unsharded fp64 oracle; derivation in "
                         "docs/bounds.md"),
    ]
