"""Our experts inside whole models of transformers: every layer is judged from what it was handed, by the usual bounds.

Logits of whole models are not compared: between two right runs they differ by what attention and norms make of the last
bits, for which there is no bound here. A model differs from itself in its experts alone; each of those is judged.
"""

import os
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

if reason := os.environ.get("MOE_REF_WITHOUT_TRANSFORMERS"):
    pytest.skip(f"MOE_REF_WITHOUT_TRANSFORMERS: {reason}", allow_module_level=True)

import moe_fast
import moe_ref
from moe_ref.adapters import experts_interface
from moe_ref.adapters.experts_interface import experts_spec, experts_weights, register
from moe_ref.adapters.transformers_blocks.families import FAMILIES
from moe_ref.contract.capabilities import Numerics
from moe_ref.contract.errors import UsageTypeError, UsageValueError
from moe_ref.contract.routing import Routing
from moe_ref.contract.spec import MLP
from moe_ref.contract.vocabulary import Dtype, Format, Stage
from moe_ref.tolerances.load import load_tolerances
from moe_ref.verify.bounds.output import output_bound
from moe_ref.verify.bounds.rounding import RoundingModel
from tests.backward_bound import bounds
from tests.backward_cases import Inputs
from tests.third_party.blocks import build
from tests.third_party.data import tokens
from tests.third_party.families import FAMILIES as BLOCKS
from tests.whole_models import CONFIGS, IDS, Layer, model, watched


@pytest.fixture(autouse=True)
def registered() -> None:
    """Both packages under their names; a registration is for the process."""
    register("moe_ref", moe_ref.experts)
    register("moe_fast", moe_fast.experts)


def contract(implementation: str, dtype: Dtype) -> Numerics:
    """How it rounds: the oracle once, at its end."""
    if implementation == "moe_fast":
        return moe_fast.CAPABILITIES.numerics[dtype]
    if implementation == "moe_ref":
        return Numerics(storage=dict.fromkeys((Stage.MERGED, Stage.REDUCED), Format(dtype.value)))
    return next(family for family in FAMILIES if family.module == "olmoe").numerics(dtype, "eager")


def ratio(layer: Layer, implementation: str, dtype: Dtype, **spec: Any) -> float:
    """The largest error of a layer's output over its bound; spec: what of it to take otherwise."""
    numerics = contract(implementation, dtype)
    held, routing = experts_weights(layer.module), Routing(layer.ids_TK, layer.weights_TK)
    judged_by = RoundingModel.of(load_tolerances(), "cpu", numerics, dtype)
    computed = replace(experts_spec(layer.module, layer.ids_TK.shape[1]), **spec)
    truth_TH, bound_TH = output_bound(layer.x_TH, routing, held, computed, numerics, judged_by)
    return float(((layer.output_TH.double() - truth_TH).abs() / bound_TH).max())


@pytest.mark.sampled(every=4)
@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "moe_ref", "moe_fast"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_layer_is_within_its_bound(name: str, implementation: str) -> None:
    """transformers' own loop too: what is read from the module is then what the module computes."""
    made = model(name)
    made.set_experts_implementation(implementation)
    with watched(made) as layers:
        made(IDS)
    assert len(layers) == 2
    assert max(ratio(layer, implementation, Dtype.FP32) for layer in layers) < 1


@torch.no_grad()
@pytest.mark.parametrize("title", ["glm5_next", "hy_v4", "openai_privacy_filter", "nemotron_h"])
def test_other_gates(title: str) -> None:
    """Blocks by themselves, where no tiny model is at hand: limits that are reached, no interleaving, no gate."""
    block = build(BLOCKS[title], torch.float32)
    with watched(block) as layers:
        block(tokens())
    assert ratio(layers[0], "eager", Dtype.FP32) < 1


@torch.no_grad()
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_bf16(name: str) -> None:
    """Mixtral's weights arrive in fp32, those of gpt-oss in bf16."""
    made = model(name, torch.bfloat16)
    made.set_experts_implementation("moe_fast")
    with watched(made) as layers:
        made(IDS)
    assert max(ratio(layer, "moe_fast", Dtype.BF16) for layer in layers) < 1


@torch.no_grad()
@pytest.mark.parametrize(("name", "mistaken"), [
    ("mixtral", MLP(activation="gelu_tanh")), ("gpt_oss", MLP(bias=True)),
    ("gpt_oss", MLP(bias=True, limit=0.6, sigmoid_scale=1.702, up_offset=1.0))])
def test_another_mlp_would_be_seen(name: str, mistaken: MLP) -> None:
    """The test above can fail: it does for other mathematics than the module's."""
    made = model(name)
    with watched(made) as layers:
        made(IDS)
    assert min(ratio(layer, "eager", Dtype.FP32, experts=mistaken) for layer in layers) > 1


@torch.no_grad()
def test_gate_and_up_the_wrong_way_round_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted mistake of the adapter's."""
    right = experts_interface._by_projection
    with monkeypatch.context() as patch:
        patch.setattr(experts_interface, "_by_projection", lambda module, tensor: right(module, tensor).flip(1))
        made = model("mixtral")
        made.set_experts_implementation("moe_ref")
        with watched(made) as layers:
            made(IDS)
    assert min(ratio(layer, "moe_ref", Dtype.FP32) for layer in layers) > 1


@pytest.mark.sampled(every=4)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_training_step(name: str) -> None:
    """Gradients of the experts' parameters, layer by layer, against the oracle's for what the layer was handed.

    The bound is that of two fp64 evaluations (tests/backward_bound.py) with the unit of fp32 in place of fp64's.
    """
    made = model(name).train()
    made.set_experts_implementation("moe_fast")
    with watched(made) as layers:
        made(IDS, labels=IDS).loss.backward()
    assert len(layers) == 2
    for layer in layers:
        (gradient_TH,) = layer.gradients
        held, spec = experts_weights(layer.module), experts_spec(layer.module, 2)
        routing = Routing(layer.ids_TK, layer.weights_TK)
        want = moe_ref.moe_backward(gradient_TH, layer.x_TH, detached(held), spec, routing=routing)
        inputs = Inputs(layer.x_TH, detached(held), gradient_TH, torch.zeros_like(layer.x_TH))
        allowed = bounds(inputs, spec, routing, injected=True)
        got = experts_weights(gradients_in_place(layer.module))
        for field in ("w13_EGIH", "w2_EHI", *(("w13_bias_EGI", "w2_bias_EH") if spec.experts.bias else ())):
            error = (getattr(got, field).double() - getattr(want, field)).abs()
            assert float(getattr(want, field).abs().max()) > 0
            limit = allowed[field]
            assert limit is not None
            assert bool((error <= limit * 2.0**29).all()), field


def detached(weights: moe_ref.MoEWeights) -> moe_ref.MoEWeights:
    """The same numbers, out of the graph."""
    return moe_ref.MoEWeights(**{name: tensor.detach() for name, tensor in weights.named_tensors()})


def gradients_in_place(module: Any) -> Any:
    """The module's marks with the gradients of its parameters in their places."""
    marks = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
    return SimpleNamespace(**{name: getattr(module, name) for name in marks},
                           **{name: parameter.grad for name, parameter in module.named_parameters()})


def experts_of(made: torch.nn.Module) -> Any:
    """Its first experts module."""
    return next(module for module in made.modules() if hasattr(module, "is_transposed"))


def test_a_gate_of_its_own_is_refused() -> None:
    """A plain SwiGLU of its parameters would be silently wrong, which one of transformers' own backends is."""
    made = model("mixtral")
    experts = experts_of(made)
    experts._apply_gate = lambda gate_up: gate_up.chunk(2, dim=-1)[0]
    made.set_experts_implementation("moe_ref")
    with pytest.raises(UsageValueError, match="MixtralExperts: a gate of its own"):
        made(IDS)


def test_what_else_is_refused() -> None:
    """An activation without a word here, a norm after every expert, and wrong registrations."""
    experts = experts_of(model("mixtral"))
    experts.act_fn = torch.nn.Tanh()
    with pytest.raises(UsageValueError, match="activation Tanh, but should be one of silu"):
        experts_spec(experts, 2)
    experts.has_post_expert_norm = True
    with pytest.raises(UsageValueError, match="a norm after every expert"):
        experts_spec(experts, 2)
    with pytest.raises(UsageValueError, match="name 'eager', but should be none"):
        register("eager", moe_ref.experts)
    not_a_function: Any = moe_ref
    with pytest.raises(UsageTypeError, match="module, but should be a function"):
        register("mine", not_a_function)


def test_gates_that_are_listed_exist() -> None:
    """A name that transformers has changed would be refused as unknown, and nobody would look for it here."""
    for module, name in experts_interface.GATES:
        found: Any = __import__(module, fromlist=["_"])
        for part in name.split("."):
            found = getattr(found, part)
        assert (found.__module__, found.__qualname__) == (module, name)
