"""Protects the mathematics of a layer: invalid ones cannot be built, and all faults are listed at once."""

import pytest

from moe_ref.contract.errors import UsageError, UsageValueError
from moe_ref.contract.spec import MLP, MoESpec, Router, SharedExpert


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


@pytest.mark.parametrize(("options", "fault"), [
    ({"num_groups": 4, "num_groups_kept": 1, "top_k": 3}, "the 1 groups kept hold only 2 experts"),
    ({"num_groups": 8, "num_groups_kept": 8, "group_score": "top2_sum"}, "groups hold a single expert"),
    ({"scaling_factor": float("inf")}, "scaling_factor=inf"),
    ({"scaling_factor": float("nan")}, "scaling_factor=nan"),
    ({"renormalize_epsilon": float("nan")}, "renormalize_epsilon=nan"),
    ({"top_k": True}, "top_k=True"),
    ({"top_k": 2.0}, "top_k=2.0"),
])
def test_router_that_cannot_be_computed(options: dict, fault: str) -> None:
    """Each would divide by zero, choose from too few, or be no number."""
    assert fault in message(lambda: Router(**{"num_experts": 8, "top_k": 2, **options}))


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
