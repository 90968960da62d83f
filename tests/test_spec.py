"""Protects the mathematics of a layer: invalid ones cannot be built, and all faults are listed at once."""

import numpy as np
import pytest

from moe_ref.contract.errors import UsageError, UsageValueError
from moe_ref.contract.features import Feature, features_of
from moe_ref.contract.spec import MLP, Capacity, MoESpec, Router, SharedExpert
from tests.double.families import FAMILIES


def message(build: object) -> str:
    """What building an invalid object says."""
    with pytest.raises(UsageValueError) as caught:
        build()
    assert isinstance(caught.value, UsageError)
    assert isinstance(caught.value, ValueError)
    return str(caught.value)


def test_all_faults_of_the_sizes_at_once() -> None:
    """Whoever fixes one number should not have to find the next by trying again."""
    text = message(lambda: Router(num_experts=0, top_k=-1, num_groups=0, score="relu", group_score="mean"))
    for fault in ("num_experts=0", "top_k=-1", "num_groups=0", "score='relu'", "group_score='mean'",
                  "softmax, sigmoid", "max, top2_sum"):
        assert fault in text
    assert text.startswith("Router: ")


def test_all_faults_of_the_combination_at_once() -> None:
    """Valid one by one, wrong together: five faults, each with both numbers."""
    text = message(lambda: Router(num_experts=8, top_k=9, num_groups=3, num_groups_kept=4,
                                  renormalize_epsilon=-1.0, scaling_factor=0.0))
    for fault in ("top_k=9, but should be at most num_experts=8", "num_groups=3, but should divide num_experts=8",
                  "num_groups_kept=4, but should be at most num_groups=3", "renormalize_epsilon=-1.0",
                  "scaling_factor=0.0"):
        assert fault in text


def test_all_faults_of_the_kinds_at_once() -> None:
    """A switch in words is true whatever it says, and a part of another kind would fail far from here."""
    text = message(lambda: Router(num_experts=8, top_k=2, logit_bias=1, renormalize="false", capacity=8,
                                  logit_scale="1"))
    for fault in ("logit_bias=1, but should be True or False", "renormalize='false', but should be True or False",
                  "capacity=8, but should be a Capacity or None",
                  "logit_scale='1', but should be finite and above 0"):
        assert fault in text
    text = message(lambda: MoESpec(hidden_size=0, intermediate_size=4, router=8, experts="silu", shared=64,
                                   output_bias=None))
    for fault in ("hidden_size=0", "router=8, but should be a Router or None",
                  "experts='silu', but should be an MLP", "shared=64, but should be a SharedExpert or None",
                  "output_bias=None, but should be True or False"):
        assert fault in text
    text = message(lambda: SharedExpert(intermediate_size=8, mlp=None, gate="router",
                                        merge=np.array(["sum", "mean"])))
    assert "mlp=None, but should be an MLP" in text
    assert "but should be one of sum, mean" in text
    text = message(lambda: MLP(gated="no", bias=0, limit=True))
    for fault in ("gated='no'", "bias=0, but should be True or False",
                  "limit=True, but should be finite and above 0"):
        assert fault in text


@pytest.mark.parametrize(("build", "fault"), [
    (lambda: MoESpec(hidden_size=4, intermediate_size=4, experts=None), "experts=None, but should be an MLP"),
    (lambda: MoESpec(hidden_size=4, intermediate_size=4, router=MLP(), weight_on="input"),
     "but should be a Router or None"),
    (lambda: SharedExpert(intermediate_size=4, mlp=None), "mlp=None, but should be an MLP"),
    (lambda: Capacity(tokens=1, renormalize_after="no"), "renormalize_after='no', but should be True or False"),
    (lambda: Router(num_experts=4, top_k=2, epsilon_rule="clamp", renormalize=True,
                    renormalize_epsilon=np.ones(2)),
     "renormalize_epsilon=array([1., 1.]), but should be finite and at least 0"),
], ids=["no experts", "an MLP as router", "no MLP", "a word as switch", "an array as epsilon"])
def test_a_part_of_another_kind(build: object, fault: str) -> None:
    """Alone, and where a combination would ask the part for something."""
    assert fault in message(build)


@pytest.mark.parametrize(("build", "fault"), [
    (lambda: Router(num_experts=4, top_k=2, scaling_factor=10**400), "scaling_factor=an integer of 1329 bits"),
    (lambda: Router(num_experts=4, top_k=2, scaling_factor=10**5000), "scaling_factor=an integer of 16610 bits"),
    (lambda: Router(num_experts=10**5000, top_k=2), "num_experts=an integer of 16610 bits, but should be below"),
    (lambda: Router(num_experts=4, top_k=-(10**5000)), "top_k=an integer of 16610 bits, but should be an integer"),
    (lambda: Router(num_experts=4, top_k=2, num_zero_experts=2**63), "num_zero_experts=9223372036854775808, but"),
    (lambda: Capacity(tokens=10**5000, factor=10**5000), "factor=an integer of 16610 bits, but exactly one"),
], ids=["no float", "not printed", "too many experts", "too few", "too many identity experts", "capacity"])
def test_numbers_beyond_the_machine(build: object, fault: str) -> None:
    """No float holds them, no tensor has so many rows, and Python refuses to print more than 4300 digits."""
    assert fault in message(build)


def test_equal_specs_print_alike() -> None:
    """Ranks compare the text of their specs, so a factor of 1 must not differ from 1.0, nor 0 from -0.0."""
    def spec(one: object, zero: object) -> MoESpec:
        mlp = MLP(limit=one, sigmoid_scale=one, up_offset=zero, gate_softcap=zero, up_softcap=zero)
        router = Router(num_experts=4, top_k=2, logit_scale=one, logit_softcap=zero, renormalize_epsilon=zero,
                        scaling_factor=one, capacity=Capacity(factor=one))
        return MoESpec(hidden_size=4, intermediate_size=4, router=router, experts=mlp)

    plain = spec(1.0, 0.0)
    for other in (spec(1, 0), spec(np.float64(1), np.float64(0)), spec(1.0, -0.0)):
        assert other == plain
        assert repr(other) == repr(plain)


@pytest.mark.parametrize(("options", "fault"), [
    ({"num_groups": 4, "num_groups_kept": 1, "top_k": 3}, "the 1 groups kept hold only 2 experts"),
    ({"num_groups": 8, "num_groups_kept": 8, "group_score": "top2_sum"}, "groups hold a single expert"),
    ({"scaling_factor": float("inf")}, "scaling_factor=inf"),
    ({"scaling_factor": float("nan")}, "scaling_factor=nan"),
    ({"renormalize_epsilon": float("nan")}, "renormalize_epsilon=nan"),
    ({"top_k": True}, "top_k=True"),
    ({"top_k": 2.0}, "top_k=2.0"),
    ({"num_zero_experts": -1}, "num_zero_experts=-1"),
    ({"top_k": 11, "num_zero_experts": 2}, "top_k=11, but should be at most num_experts=10"),
    ({"num_groups": 2, "num_groups_kept": 2, "num_zero_experts": 2}, "zero experts have no group"),
    ({"num_zero_experts": 2, "learned_scale": "expert"}, "not defined for zero experts"),
    ({"num_groups": 2, "num_groups_kept": 2, "selection_bias": "logit"}, "'logit' and expert groups"),
    ({"selection_bias": "both"}, "selection_bias='both', but should be one of score, logit, None"),
    ({"learned_scale": True}, "learned_scale=True, but should be one of layer, expert, None"),
    ({"epsilon_rule": "clamp"}, "no renormalize_epsilon to clamp at"),
    ({"epsilon_rule": "clamp", "renormalize": True}, "no renormalize_epsilon to clamp at"),
    ({"epsilon_rule": "clamp", "renormalize_epsilon": 0.5}, "no renormalize_epsilon to clamp at"),
    ({"logit_scale": 0.0}, "logit_scale=0.0, but should be finite and above 0"),
    ({"logit_softcap": -1.0}, "logit_softcap=-1.0, but should be finite and at least 0"),
    ({"group_fill": "inf"}, "group_fill='inf'"),
    ({"capacity": Capacity(tokens=1, renormalize_after=True)}, "but renormalize is False"),
])
def test_router_that_cannot_be_computed(options: dict, fault: str) -> None:
    """Each would divide by zero, choose from too few, or be no number."""
    assert fault in message(lambda: Router(**{"num_experts": 8, "top_k": 2, **options}))


@pytest.mark.parametrize(("options", "fault"), [
    ({}, "tokens=None, factor=None, but exactly one"),
    ({"tokens": 2, "factor": 1.0}, "tokens=2, factor=1.0, but exactly one"),
    ({"tokens": 0}, "tokens=0, but should be an integer of at least 1"),
    ({"factor": 0.0}, "factor=0.0, but should be finite and above 0"),
    ({"factor": float("inf")}, "factor=inf"),
    ({"tokens": 1, "sequence_length": 0}, "sequence_length=0"),
    ({"tokens": 1, "priority": "first"}, "priority='first', but should be one of token, choice, weight"),
])
def test_capacity_that_limits_nothing(options: dict, fault: str) -> None:
    """One limit, in one of two forms, and a known order."""
    assert fault in message(lambda: Capacity(**options))


@pytest.mark.parametrize(("capacity", "num_tokens", "limit"), [
    (Capacity(tokens=3), 100, 3),
    # 1 * 8 * 2 / 4 = 4 exactly; 9 tokens make 4.5
    (Capacity(factor=1.0), 8, 4),
    (Capacity(factor=1.0), 9, 5),
    # 1.25 * 8 * 2 / 4 = 5
    (Capacity(factor=1.25), 8, 5),
    (Capacity(factor=0.125), 1, 1),
    (Capacity(factor=1.0), 0, 0),
    # 1e308 * 50 is infinite in double precision; there are 100 slots to take
    (Capacity(factor=1e308), 50, 100),
    (Capacity(factor=1e308), 0, 0),
    # 3 * 8 * 2 / 4 = 12 of 16 slots; 5 * 8 * 2 / 4 = 20 would be more than there are
    (Capacity(factor=3.0), 8, 12),
    (Capacity(factor=5.0), 8, 16),
])
def test_the_limit_of_a_capacity(capacity: Capacity, num_tokens: int, limit: int) -> None:
    """Rounded up: four experts, K = 2."""
    assert capacity.limit(num_tokens, top_k=2, num_experts=4) == limit


@pytest.mark.parametrize(("options", "fault"), [
    ({"activation": "gelu", "sigmoid_scale": 1.702}, "sigmoid_scale and gate_softcap belong to silu"),
    ({"activation": "relu", "gate_softcap": 1.0}, "sigmoid_scale and gate_softcap belong to silu"),
    ({"gated": False, "up_offset": 1.0}, "need an up projection"),
    ({"gated": False, "up_softcap": 1.0}, "need an up projection"),
    ({"limit_at": "after"}, "limit_at='after', but there is no limit"),
    ({"limit_at": "between"}, "limit_at='between'"),
    ({"limit": 0.0}, "limit=0.0, but should be finite and above 0"),
    ({"limit": 1.0, "up_softcap": 1.0}, "limit and softcaps are not defined together"),
    ({"sigmoid_scale": 0.0}, "sigmoid_scale=0.0"),
    ({"up_offset": float("nan")}, "up_offset=nan, but should be finite"),
    ({"gate_softcap": -1.0}, "gate_softcap=-1.0, but should be finite and at least 0"),
])
def test_mlp_that_cannot_be_computed(options: dict, fault: str) -> None:
    """Options that contradict each other, or that would silently do nothing."""
    assert fault in message(lambda: MLP(**options))


@pytest.mark.parametrize(("options", "fault"), [
    ({"num_experts": 2}, "only gate='router' tells shared experts apart"),
    ({"num_experts": 3, "gate": "router"}, "intermediate_size=8, but should be a multiple of num_experts=3"),
    ({"gate": "router", "mlp": MLP(bias=True)}, "gate='router' and mlp.bias"),
    ({"merge": "max"}, "merge='max', but should be one of sum, mean"),
])
def test_shared_expert_that_cannot_be_computed(options: dict, fault: str) -> None:
    """A block of the width needs a weight of its own, and a bias belongs to no block."""
    assert fault in message(lambda: SharedExpert(**{"intermediate_size": 8, **options}))


@pytest.mark.parametrize(("options", "fault"), [
    ({"weight_on": "input"}, "needs a router without zero experts"),
    ({"weight_on": "input", "router": Router(num_experts=2, top_k=1, num_zero_experts=1)}, "without zero experts"),
    ({"weight_on": "input", "router": Router(num_experts=2, top_k=1), "experts": MLP(bias=True)},
     "weight_on='input' and experts.bias"),
    ({"weight_on": "act"}, "weight_on='act', but should be one of output, input"),
    ({"shared": SharedExpert(intermediate_size=4, gate="router")}, "but there is no router"),
    ({"shared": SharedExpert(intermediate_size=4, gate="router"), "router": Router(num_experts=2, top_k=1)},
     "shared.gate='router' and score='softmax'"),
])
def test_layer_that_cannot_be_computed(options: dict, fault: str) -> None:
    """Parts that are valid one by one."""
    assert fault in message(lambda: MoESpec(**{"hidden_size": 4, "intermediate_size": 4, **options}))


def test_every_published_feature_is_needed_by_some_family() -> None:
    """One that no released family has would be tested by drawn layers alone; a residual is no part of a spec."""
    found = frozenset().union(*map(features_of, FAMILIES.values()))
    assert set(Feature) - found == {Feature.RESIDUAL}


def test_other_parts_check_themselves() -> None:
    """Widths and names of the MLP, the shared expert and the layer."""
    assert "activation='tanh'" in message(lambda: MLP(activation="tanh"))
    text = message(lambda: SharedExpert(intermediate_size=0, gate="softmax"))
    assert "intermediate_size=0" in text
    assert "gate='softmax'" in text
    text = message(lambda: MoESpec(hidden_size=0, intermediate_size=-4))
    assert "hidden_size=0" in text
    assert "intermediate_size=-4" in text


def test_a_layer_without_a_router_is_one_expert() -> None:
    """E = 1 and K = 1, so that every formula holds for a dense MLP too."""
    spec = MoESpec(hidden_size=4, intermediate_size=8)
    assert (spec.num_experts, spec.top_k) == (1, 1)


def test_specs_are_values() -> None:
    """Frozen, equal by content, usable as a key: the mathematics cannot change behind a weight's back."""
    one, two = (MoESpec(hidden_size=4, intermediate_size=8, router=Router(num_experts=4, top_k=2)) for _ in "ab")
    assert one == two
    assert hash(one) == hash(two)
    with pytest.raises(AttributeError):
        one.hidden_size = 5
