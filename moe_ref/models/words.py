"""A layer's mathematics and released numerics in words, step by step. Imports no torch."""

from moe_ref.contract.released import ReleasedNumerics
from moe_ref.contract.router_spec import Capacity, Router
from moe_ref.contract.spec import MLP, MoESpec, SharedExpert

_SCORES = {"softmax": "softmax over all logits", "sigmoid": "sigmoid of each logit",
           "sqrt_softplus": "sqrt(softplus) of each logit"}
_ACTIVATIONS = {"silu": "silu({})", "gelu": "gelu({})", "gelu_tanh": "gelu_tanh({})", "relu": "relu({})",
                "relu_squared": "relu({})^2"}


def router_steps(router: Router) -> list[str]:
    """One sentence per step, from the tokens to ids and weights."""
    steps = [_logits(router), f"The score is the {_SCORES[router.score]}."]
    if router.selection_bias:
        to = "score" if router.selection_bias == "score" else "logit, which takes the score's place"
        steps.append(f"For the selection alone, a learned bias per expert is added to the {to}.")
    if router.num_groups > 1:
        steps.append(_groups(router))
    steps.append(f"The {router.top_k} best are selected, ties to the lower id; their weights are their scores.")
    if router.renormalize:
        steps.append(f"The weights are divided by {_denominator(router)}.")
    if router.scaling_factor != 1.0:
        steps.append(f"The weights are multiplied by {router.scaling_factor:g}.")
    if router.learned_scale:
        one = "one learned number" if router.learned_scale == "layer" else "a learned number per expert"
        steps.append(f"The weights are multiplied by {one}.")
    if router.num_zero_experts:
        last = router.num_choices - 1
        steps.append(f"Ids {router.num_experts} to {last} are identity experts: they return the token.")
    return steps + ([_capacity(router.capacity)] if router.capacity else [])


def _logits(router: Router) -> str:
    bias = " + a learned bias" if router.logit_bias else ""
    scale = f", times {router.logit_scale:g}" if router.logit_scale != 1.0 else ""
    cap = f", then {router.logit_softcap:g} * tanh(. / {router.logit_softcap:g})" if router.logit_softcap else ""
    return f"{router.num_choices} logits per token are x @ router^T{bias}{scale}{cap}."


def _groups(router: Router) -> str:
    by = "the sum of their two largest" if router.group_score == "top2_sum" else "their largest"
    others = "cannot be chosen" if router.group_fill == "minus_inf" else "compete with 0"
    return (f"The experts form {router.num_groups} consecutive groups; the {router.num_groups_kept} best by {by} "
            f"stay, experts of the others {others}.")


def _denominator(router: Router) -> str:
    if not router.renormalize_epsilon:
        return "their sum"
    epsilon = f"{router.renormalize_epsilon:g}"
    return f"their sum + {epsilon}" if router.epsilon_rule == "add" else f"max(their sum, {epsilon})"


def _capacity(capacity: Capacity) -> str:
    limit = (f"{capacity.tokens} tokens" if capacity.tokens is not None
             else f"ceil({capacity.factor:g} * tokens * top_k / num_experts) tokens")
    window = f" in every {capacity.sequence_length} consecutive tokens" if capacity.sequence_length else ""
    first = {"token": "lower tokens first", "choice": "first choices first, then lower tokens",
             "weight": "larger weights first"}[capacity.priority]
    after = "; weights are renormalised over what is left" if capacity.renormalize_after else ""
    return f"An expert takes {limit}{window}, {first}; the others are dropped{after}."


def mlp_formula(mlp: MLP) -> str:
    """The MLP as a formula of one token x."""
    b1, b3, b2 = (" + b1", " + b3", " + b2") if mlp.bias else ("", "", "")
    gate, up = f"w1 @ x{b1}", f"w3 @ x{b3}"
    before, after = mlp.limit_at == "before", mlp.limit is not None and mlp.limit_at == "after"
    limited = f"min({gate}, {mlp.limit:g})" if mlp.limit is not None and before else gate
    if mlp.limit is not None:
        up = f"clamp({up}, +-{mlp.limit:g})"
    plain = mlp.sigmoid_scale == 1.0 and not mlp.gate_softcap
    act, where = (_ACTIVATIONS[mlp.activation].format(limited), "") if plain else (_swish(mlp), f", g = {limited}")
    act = f"min({act}, {mlp.limit:g})" if after else act
    if mlp.up_softcap:
        where += f", u = {up}"
        up = f"{mlp.up_softcap:g} * tanh(u / {mlp.up_softcap:g})"
    if mlp.up_offset:
        up = f"{up} + {mlp.up_offset:g}"
    return f"w2 @ ({act} * ({up})){b2}{where}" if mlp.gated else f"w2 @ {act}{b2}{where}"


def _swish(mlp: MLP) -> str:
    scale = "g" if mlp.sigmoid_scale == 1.0 else f"{mlp.sigmoid_scale:g} * g"
    factor = f"{mlp.gate_softcap:g} * tanh(g / {mlp.gate_softcap:g})" if mlp.gate_softcap else "g"
    return f"{factor} * sigmoid({scale})"


def shared_words(shared: SharedExpert) -> str:
    """Width, formula, gate and merge of the shared expert."""
    gate = {"none": "", "sigmoid": ", times sigmoid(gate @ x)",
            "router": f", in {shared.num_experts} blocks weighted by further columns of the router, whose scores "
                      "take part in the renormalisation"}[shared.gate]
    merge = "; the result is the mean of routed and shared" if shared.merge == "mean" else ""
    return f"intermediate {shared.intermediate_size}: {mlp_formula(shared.mlp)}{gate}{merge}"


def brief(spec: MoESpec) -> str:
    """The kind of layer in one line, without sizes; silu-gated experts are not mentioned."""
    words = [_brief_router(spec.router) if spec.router else "no router"]
    words += [f"experts {mlp_formula(spec.experts)}"] * (spec.experts != MLP())
    words += [_brief_shared(spec.shared, spec.experts)] if spec.shared else []
    words += ["the weight multiplies the input"] * (spec.weight_on == "input")
    return "; ".join(words + ["a bias after the merge"] * spec.output_bias)


def _brief_router(router: Router) -> str:
    words = [router.score.replace("_", " ") + (" of biased logits" if router.logit_bias else "")]
    if router.selection_bias:
        words.append("selection bias" + (" on logits" if router.selection_bias == "logit" else ""))
    if router.num_groups > 1:
        words.append(f"groups by {router.group_score.replace('_', ' ')}"
                     + (" filled with 0" if router.group_fill == "zero" else ""))
    if router.renormalize:
        words.append(f"weights / {_denominator(router)}")
    if router.scaling_factor != 1.0:
        words.append(f"times {router.scaling_factor:g}")
    if router.learned_scale:
        words.append(f"learned scale per {router.learned_scale}")
    words += ["identity experts"] * bool(router.num_zero_experts) + ["capacity"] * (router.capacity is not None)
    return ", ".join(words)


def _brief_shared(shared: SharedExpert, experts: MLP) -> str:
    gate = {"none": "", "sigmoid": " with a sigmoid gate", "router": " weighted by the router"}[shared.gate]
    own = "" if shared.mlp == experts else f", {mlp_formula(shared.mlp)}"
    return f"shared expert{gate}{own}{', averaged with the routed' if shared.merge == 'mean' else ''}"


def numerics_words(numerics: ReleasedNumerics) -> list[str]:
    """Where the published code rounds; "model" is the dtype of tokens and weights."""
    words = [f"logits in {numerics.logits}", f"scores in {numerics.score}", f"weights in {numerics.weight}"]
    words += ["scores of the selected logits only"] * numerics.score_after_selection
    words += ["the scaling factor multiplies the routed output"] * (numerics.scale_on == "output")
    words += ["the weight multiplies the activation"] * (numerics.weight_at == "act")
    plain = ReleasedNumerics()
    return words + [f"{name} in {getattr(numerics, name)}" for name in ("rows", "activation", "merge")
                    if getattr(numerics, name) != getattr(plain, name)]
