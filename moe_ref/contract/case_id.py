"""The text form of a case: parse(format(case)) == case, and only the canonical text parses. Imports no torch.

Grammar, sections joined by "-", defaults left out, order fixed:

    v1 - SIZES - DTYPE [-SCHEME] [- router words] [- mlp words] [-res] [-PATTERN] [-DATA] [-sSEED] [-tpN] [-epN]
      [-splitA.B] [-SCHEDULE] [-TOKENS] [-shareA.B] [-HOSTING] [-copyE.E] [-wholeshared] [-STORAGE] [-bwd]

    SIZES   T33.H96.I160.E8.K2   tokens, hidden, intermediate, experts, top-k; without E and K: a dense MLP
            mixtral.8x7b.T32     a published model; .E4 cuts the number of experts, never a width
    scheme  fp8tensor | fp8row | fp8block | int8 | gptq | gptq32 | gptqorder | awq | mxfp4 | mxfp8 | nvfp4 ...
    router  sigmoid | norm | eps1em20 | bias | g8.4 (groups.kept) | top2sum | scale2.5 ... see spec_words.py
    mlp     gelu | gelutanh ... ; shared expert: sh256 | shgate | shgelu | shgelutanh ... ; weightinput | outbias
    others  zipf | onehot | empty | allone | ties ; outlier | large | nonfinite | exact | equal | extreme ; s7 ; tp4
            ep2 ; split60.40
    spread  allreducerows | reducescatter | gather ; tokenstp | tokensep | tokensboth ; share3.0.1 (of the tokens)
            roundrobin ; copy0.3 (experts 0 and 3 have one copy more) ; wholeshared
    bwd     the gradients too

Letters, digits, dot and hyphen only; "m" is minus, as in eps1em20. A later grammar gets another prefix;
what an id means never changes.
"""

import re
from enum import StrEnum
from functools import lru_cache

from moe_ref.contract.case import Case, Problem
from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.parallel import Parallel
from moe_ref.contract.spec import MoESpec, Router
from moe_ref.contract.spec_words import COUNT, apply_spec_options, match_option, spec_words
from moe_ref.contract.vocabulary import (
    Data,
    Direction,
    Dtype,
    Hosting,
    Pattern,
    Schedule,
    Scheme,
    SharedPlacement,
    Storage,
    Tokens,
)
from moe_ref.models.registry import cut_experts, find_model

PREFIX = "v1"
_KEPT = 4096
"""Words and specs that are read once: the cases of a tier share them."""
_SIZES = re.compile(rf"T({COUNT})\.H({COUNT})\.I({COUNT})(?:\.E({COUNT})\.K({COUNT}))?")
_MODEL = re.compile(rf"([a-z][a-z0-9.]*?)\.T({COUNT})(?:\.E({COUNT}))?")


def format_case(case: Case) -> str:
    """The id of a case."""
    words = [format_problem(case.problem)]
    if case.parallel.tp > 1:
        words.append(f"tp{case.parallel.tp}")
    if case.parallel.ep > 1:
        words.append(f"ep{case.parallel.ep}")
    words += _spread_words(case)
    words += [case.storage] * (case.storage is not Storage.OUT_IN)
    words += [case.direction] * (case.direction is Direction.BACKWARD)
    return "-".join(words)


_SPREAD_WORDS: dict[str, dict[str, StrEnum]] = {
    "schedule": {one.replace("_", ""): one for one in Schedule if one is not Schedule.ALL_REDUCE},
    "tokens": {"tokenstp": Tokens.SHARDED_TP, "tokensep": Tokens.SHARDED_EP, "tokensboth": Tokens.SHARDED},
    "hosting": {"roundrobin": Hosting.ROUND_ROBIN}, "shared": {"wholeshared": SharedPlacement.REPLICATED}}
"""Fields of Parallel whose default is left out, and the word of each other value."""


def _spread_words(case: Case) -> list[str]:
    parallel = case.parallel
    named = {name: [word for word, value in words.items() if value is getattr(parallel, name)]
             for name, words in _SPREAD_WORDS.items()}
    return [*_list_word("split", parallel.splits), *named["schedule"], *named["tokens"],
            *_list_word("share", case.token_shares), *named["hosting"], *_list_word("copy", parallel.redundant),
            *named["shared"]]


def _list_word(name: str, numbers: tuple[int, ...] | None) -> list[str]:
    return [name + ".".join(str(number) for number in numbers)] if numbers else []


def format_problem(problem: Problem) -> str:
    """The part of an id that fixes the inputs; cases that differ in parallelism share it."""
    spec = problem.spec
    if problem.model:
        cut = spec.num_experts != find_model(problem.model).spec.num_experts
        words = [PREFIX, f"{problem.model}.T{problem.num_tokens}" + (f".E{spec.num_experts}" if cut else "")]
    else:
        experts = f".E{spec.num_experts}.K{spec.top_k}" if spec.router else ""
        words = [PREFIX, f"T{problem.num_tokens}.H{spec.hidden_size}.I{spec.intermediate_size}{experts}"]
    words.append(problem.dtype)
    words += [problem.scheme] * (problem.scheme is not Scheme.PLAIN)
    if not problem.model:
        words += spec_words(spec)
    words += ["res"] * problem.residual
    words += [problem.pattern] * (problem.pattern is not Pattern.UNIFORM)
    words += [problem.data] * (problem.data is not Data.UNIT)
    words += [f"s{problem.seed}"] * (problem.seed != 0)
    return "-".join(words)


def parse_case(text: str) -> Case:
    """The case of an id; raises UsageValueError that says which word is wrong, or what the canonical id is."""
    words = text.split("-")
    if words[0] != PREFIX or len(words) < 3:
        raise UsageValueError(f"case id {text!r}: should be {PREFIX}-SIZES-DTYPE..., as "
                              "v1-T33.H96.I160.E8.K2-bf16-norm-tp4")
    if words[2] not in tuple(Dtype):
        raise UsageValueError(f"case id {text!r}: dtype {words[2]!r}, but should be one of {', '.join(Dtype)}")
    options = _read_options(text, words[3:])
    spec, num_tokens, model = _read_sizes(text, words[1])
    if not model:
        spec = apply_spec_options(text, spec, options)
    problem = Problem(spec=spec, num_tokens=num_tokens, dtype=Dtype(words[2]), model=model,
                      residual="res" in options, seed=int(options.get("s", "0")),
                      pattern=Pattern(options.get("pattern", Pattern.UNIFORM)),
                      data=Data(options.get("data", Data.UNIT)),
                      scheme=Scheme(options.get("scheme", Scheme.PLAIN)))
    lists = {name: tuple(int(number) for number in options[name].split("."))
             for name in ("split", "share", "copy") if name in options}
    named = {name: words[options[name]] for name, words in _SPREAD_WORDS.items() if name in options}
    parallel = _parallel(int(options.get("tp", "1")), int(options.get("ep", "1")), lists.get("split"),
                         lists.get("copy", ()), tuple(named.items()))
    case = Case(problem=problem, parallel=parallel, token_shares=lists.get("share"),
                storage=Storage(options.get("storage", Storage.OUT_IN)),
                direction=Direction(options.get("direction", Direction.FORWARD)))
    if (canonical := format_case(case)) != text:
        raise UsageValueError(f"case id {text!r}: not in canonical form, which is {canonical!r}")
    return case


_VALUED = {"s": r"\d{1,10}", "tp": COUNT, "ep": COUNT,
           **dict.fromkeys(("split", "share", "copy"), rf"{COUNT}(?:\.{COUNT})*")}


def _read_options(text: str, words: list[str]) -> dict[str, str]:
    options: dict[str, str] = {}
    for word in words:
        found = _read_word(word)
        if found is None:
            raise UsageValueError(f"case id {text!r}: unknown word {word!r}")
        name, value = found
        if name in options:
            raise UsageValueError(f"case id {text!r}: {word!r} says {name} a second time")
        options[name] = value
    return options


@lru_cache(_KEPT)
def _read_word(word: str) -> tuple[str, str] | None:
    """(name, value); None for an unknown word."""
    if word == "res":
        return word, ""
    if word == Direction.BACKWARD:
        return "direction", word
    for name, values in (("pattern", tuple(Pattern)), ("data", tuple(Data)), ("storage", tuple(Storage)),
                         ("scheme", tuple(Scheme))):
        if word in values:
            return name, word
    for name, spread in _SPREAD_WORDS.items():
        if word in spread:
            return name, word
    if option := match_option(word):
        return option
    for name, form in _VALUED.items():
        if word.startswith(name) and re.fullmatch(form, word[len(name):]):
            return name, word[len(name):]
    return None


def _read_sizes(text: str, word: str) -> tuple[MoESpec, int, str]:
    if match := _SIZES.fullmatch(word):
        tokens, *sizes = match.groups()
        return _plain_spec(*sizes), int(tokens), ""
    if match := _MODEL.fullmatch(word):
        name, tokens, experts = match.groups()
        spec = find_model(name).spec
        return (cut_experts(spec, int(experts)) if experts else spec), int(tokens), name
    raise UsageValueError(f"case id {text!r}: sizes {word!r}, but should be as T33.H96.I160.E8.K2, "
                          "T33.H96.I160 or mixtral.8x7b.T32")


@lru_cache(_KEPT)
def _parallel(tp: int, ep: int, splits: tuple[int, ...] | None, redundant: tuple[int, ...],
              named: tuple[tuple[str, StrEnum], ...]) -> Parallel:
    return Parallel(tp=tp, ep=ep, splits=splits, redundant=redundant, **dict(named))  # pyrefly: ignore


@lru_cache(_KEPT)
def _plain_spec(hidden: str, intermediate: str, experts: str | None, top_k: str | None) -> MoESpec:
    router = Router(num_experts=int(experts), top_k=int(top_k)) if experts and top_k else None
    return MoESpec(hidden_size=int(hidden), intermediate_size=int(intermediate), router=router)
