"""The words of a case id that describe a layer's mathematics, and back. Imports no torch.

    router  sigmoid | norm | eps1em20 | bias | g8.4 (groups.kept) | top2sum | scale2.5 | sqrtsoftplus | biaslogit |
            fillzero | epsclamp | learnscale | expertscale | routerbias | logitscale0.5 | logitcap1.5 | zero4 |
            cap8 or capfactor1.25, with capchoice or capweight | capseq16 | capafter
    mlp     gelu | gelutanh | relu | relu2 | nogate | mlpbias | limit7 | limitafter | alpha1.702 (sigmoid_scale) |
            up1 (up_offset) | gatecap2 | upcap2
    shared  sh256 | shgate | shgelu | shgelutanh | shrelu | ... every word of mlp after "sh" | shrouter2 (gated by
            the router, 2 experts) | shmean
    layer   weightinput | outbias
"""

import re
from dataclasses import replace
from functools import lru_cache
from typing import Any

from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.spec import MLP, Capacity, MoESpec, Router, SharedExpert

COUNT = r"\d{1,9}"
NUMBER = r"\d{1,20}(?:\.\d{1,20})?(?:em?\d{1,3})?"

_ACTIVATIONS = {"silu": "", "gelu": "gelu", "gelu_tanh": "gelutanh", "relu": "relu", "relu_squared": "relu2"}
_MLP_FLAGS = (*filter(None, _ACTIVATIONS.values()), "nogate", "mlpbias", "limitafter")
_MLP_NUMBERS = {"limit": "limit", "alpha": "sigmoid_scale", "up": "up_offset", "gatecap": "gate_softcap",
                "upcap": "up_softcap"}
_MLP_VALUED = dict.fromkeys(_MLP_NUMBERS, NUMBER) | {"up": "m?" + NUMBER}

_ROUTER_FLAGS = ("sigmoid", "norm", "bias", "top2sum", "sqrtsoftplus", "biaslogit", "fillzero", "epsclamp",
                 "learnscale", "expertscale", "routerbias", "capchoice", "capweight", "capafter")
_ROUTER_VALUED = {"eps": NUMBER, "g": rf"{COUNT}\.{COUNT}", "scale": NUMBER, "logitscale": NUMBER,
                  "logitcap": NUMBER, "zero": COUNT, "cap": COUNT, "capfactor": NUMBER, "capseq": COUNT}

FLAGS = (*_ROUTER_FLAGS, *_MLP_FLAGS, *("sh" + word for word in _MLP_FLAGS), "shgate", "shmean", "weightinput",
         "outbias")
"""Words without a value."""

VALUED = (_ROUTER_VALUED | _MLP_VALUED | {"sh" + name: form for name, form in _MLP_VALUED.items()}
          | {"sh": COUNT, "shrouter": COUNT})
"""Words with a value, and the regular expression of it."""

_ROUTER_WORDS = frozenset({*_ROUTER_FLAGS, *_ROUTER_VALUED})
_SPEC_OPTIONS = frozenset({*FLAGS, *VALUED})
_KEPT = 4096
"""Specs whose words are kept: the cases of a tier share them."""

Options = dict[str, str]
"""name -> value of the words of an id; a flag's value is empty."""


def number_to_text(value: float) -> str:
    """Shortest decimal form in the alphabet of ids."""
    return repr(value).removesuffix(".0").replace("-", "m").replace("+", "")


def text_to_number(text: str) -> float:
    """The float of such a form."""
    return float(text.replace("m", "-"))


def spec_words(spec: MoESpec) -> list[str]:
    """Every option of a spec that is not its default, in canonical order."""
    return list(_words_of(spec))


@lru_cache(_KEPT)
def _words_of(spec: MoESpec) -> tuple[str, ...]:
    words = _router_words(spec.router) if spec.router else []
    words += [*_activation_word(spec.experts), *_mlp_words(spec.experts)]
    if shared := spec.shared:
        words += [f"sh{shared.intermediate_size}"] + ["shgate"] * (shared.gate == "sigmoid")
        words += ["sh" + word for word in (*_activation_word(shared.mlp), *_mlp_words(shared.mlp))]
        words += [f"shrouter{shared.num_experts}"] * (shared.gate == "router")
        words += ["shmean"] * (shared.merge == "mean")
    return (*words, *["weightinput"] * (spec.weight_on == "input"), *["outbias"] * spec.output_bias)


def _router_words(router: Router) -> list[str]:
    words = ["sigmoid"] * (router.score == "sigmoid") + ["norm"] * router.renormalize
    words += [f"eps{number_to_text(router.renormalize_epsilon)}"] * (router.renormalize_epsilon != 0)
    words += ["bias"] * (router.selection_bias == "score")
    words += [f"g{router.num_groups}.{router.num_groups_kept}"] * (router.num_groups > 1)
    words += ["top2sum"] * (router.group_score == "top2_sum")
    words += [f"scale{number_to_text(router.scaling_factor)}"] * (router.scaling_factor != 1)
    words += ["sqrtsoftplus"] * (router.score == "sqrt_softplus")
    words += ["biaslogit"] * (router.selection_bias == "logit")
    words += ["fillzero"] * (router.group_fill == "zero") + ["epsclamp"] * (router.epsilon_rule == "clamp")
    words += ["learnscale"] * (router.learned_scale == "layer")
    words += ["expertscale"] * (router.learned_scale == "expert")
    words += ["routerbias"] * router.logit_bias
    words += [f"logitscale{number_to_text(router.logit_scale)}"] * (router.logit_scale != 1)
    words += [f"logitcap{number_to_text(router.logit_softcap)}"] * (router.logit_softcap != 0)
    words += [f"zero{router.num_zero_experts}"] * (router.num_zero_experts != 0)
    return words + (_capacity_words(router.capacity) if router.capacity else [])


def _capacity_words(capacity: Capacity) -> list[str]:
    words = [f"cap{capacity.tokens}" if capacity.factor is None else f"capfactor{number_to_text(capacity.factor)}"]
    words += [f"cap{capacity.priority}"] * (capacity.priority != "token")
    words += [f"capseq{capacity.sequence_length}"] * (capacity.sequence_length is not None)
    return words + ["capafter"] * capacity.renormalize_after


def _activation_word(mlp: MLP) -> list[str]:
    return [word for word in [_ACTIVATIONS[mlp.activation]] if word]


def _mlp_words(mlp: MLP) -> list[str]:
    words, default = ["nogate"] * (not mlp.gated) + ["mlpbias"] * mlp.bias, MLP()
    for word, field in _MLP_NUMBERS.items():
        value = getattr(mlp, field)
        words += [word + number_to_text(value)] * (value != getattr(default, field))
        words += ["limitafter"] * (word == "limit" and mlp.limit_at == "after")
    return words


def apply_spec_options(text: str, spec: MoESpec, options: Options) -> MoESpec:
    """The spec with every option of the id `text`; raises UsageValueError when they need a missing router."""
    router_words = sorted(_ROUTER_WORDS & options.keys())
    if spec.router is None and router_words:
        raise UsageValueError(f"case id {text!r}: {', '.join(router_words)} need a router, E and K")
    return _with_options(spec, tuple((name, value) for name, value in options.items() if name in _SPEC_OPTIONS))


@lru_cache(_KEPT)
def _with_options(spec: MoESpec, pairs: tuple[tuple[str, str], ...]) -> MoESpec:
    options = dict(pairs)
    router = _router(spec.router, options) if spec.router else None
    return replace(spec, router=router, experts=_mlp(options, ""), shared=_shared(options),
                   weight_on="input" if "weightinput" in options else "output", output_bias="outbias" in options)


def _router(router: Router, options: Options) -> Router:
    groups, kept = (int(n) for n in options.get("g", "1.1").split("."))
    number = {name: text_to_number(options.get(name, default)) for name, default in (
        ("eps", "0"), ("scale", "1"), ("logitscale", "1"), ("logitcap", "0"))}
    return Router(
        num_experts=router.num_experts, top_k=router.top_k,
        score=_first(options, {"sigmoid": "sigmoid", "sqrtsoftplus": "sqrt_softplus"}, "softmax"),
        logit_bias="routerbias" in options, logit_scale=number["logitscale"], logit_softcap=number["logitcap"],
        selection_bias=_first(options, {"bias": "score", "biaslogit": "logit"}, None),
        num_groups=groups, num_groups_kept=kept, group_score="top2_sum" if "top2sum" in options else "max",
        group_fill="zero" if "fillzero" in options else "minus_inf", renormalize="norm" in options,
        renormalize_epsilon=number["eps"], epsilon_rule="clamp" if "epsclamp" in options else "add",
        scaling_factor=number["scale"],
        learned_scale=_first(options, {"learnscale": "layer", "expertscale": "expert"}, None),
        num_zero_experts=int(options.get("zero", "0")), capacity=_capacity(options))


def _first(options: Options, words: dict[str, str], default: str | None) -> Any:
    return next((value for word, value in words.items() if word in options), default)


def _capacity(options: Options) -> Capacity | None:
    if "cap" not in options and "capfactor" not in options:
        return None
    return Capacity(tokens=int(options["cap"]) if "cap" in options else None,
                    factor=text_to_number(options["capfactor"]) if "capfactor" in options else None,
                    priority=_first(options, {"capchoice": "choice", "capweight": "weight"}, "token"),
                    sequence_length=int(options["capseq"]) if "capseq" in options else None,
                    renormalize_after="capafter" in options)


def _shared(options: Options) -> SharedExpert | None:
    if "sh" not in options:
        return None
    return SharedExpert(intermediate_size=int(options["sh"]), mlp=_mlp(options, "sh"),
                        gate=_first(options, {"shrouter": "router", "shgate": "sigmoid"}, "none"),
                        num_experts=int(options.get("shrouter", "1")),
                        merge="mean" if "shmean" in options else "sum")


def _mlp(options: Options, prefix: str) -> MLP:
    activations = {prefix + word: name for name, word in _ACTIVATIONS.items() if word}
    numbers = {field: text_to_number(options[prefix + word]) for word, field in _MLP_NUMBERS.items()
               if prefix + word in options}
    return MLP(activation=_first(options, activations, "silu"), gated=prefix + "nogate" not in options,
               bias=prefix + "mlpbias" in options,
               limit_at="after" if prefix + "limitafter" in options else "before", **numbers)


def match_option(word: str) -> tuple[str, str] | None:
    """(name, value) of a word about the mathematics; None for any other word."""
    if word in FLAGS:
        return word, ""
    return next(((name, word[len(name):]) for name, form in VALUED.items()
                 if word.startswith(name) and re.fullmatch(form, word[len(name):])), None)
