"""Protects the sharding of an axis: every element has exactly one owner, whatever the size, degree and shares."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.parallel import Parallel
from moe_ref.contract.placements import PLACEMENTS
from moe_ref.contract.weights import MoEWeights

degrees = st.integers(1, 64)
shared_out = degrees.flatmap(lambda tp: st.builds(Parallel, tp=st.just(tp), splits=st.none() | st.lists(
    st.integers(1, 1000), min_size=tp, max_size=tp).map(tuple)))


@given(shared_out, st.integers(0, 10**7))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_ranges_cover_without_gap_or_overlap(parallel: Parallel, size: int) -> None:
    """[0, N) in rank order, one range per rank, none reversed."""
    ranges = parallel.ranges(size)
    assert len(ranges) == parallel.tp
    assert ranges[0][0] == 0
    assert ranges[-1][1] == size
    assert all(one[1] == two[0] for one, two in pairwise(ranges))
    assert all(start <= stop for start, stop in ranges)


@given(degrees, st.integers(0, 10**7))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_equal_shares_differ_by_at_most_one(tp: int, size: int) -> None:
    """No rank waits for another one's two extra columns."""
    widths = [stop - start for start, stop in Parallel(tp=tp).ranges(size)]
    assert max(widths) - min(widths) <= 1


@given(shared_out, st.integers(0, 10**6))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_shares_are_kept_to_one_element(parallel: Parallel, size: int) -> None:
    """A rank's width is its share of N, rounded by less than one in either direction."""
    shares = parallel.splits or (1,) * parallel.tp
    for (start, stop), share in zip(parallel.ranges(size), shares, strict=True):
        assert abs((stop - start) * sum(shares) - size * share) < sum(shares)


@pytest.mark.parametrize(("parallel", "size", "widths"), [
    (Parallel(tp=3), 32, [11, 11, 10]),
    (Parallel(tp=2, splits=(60, 40)), 160, [96, 64]),
    (Parallel(tp=8), 33, [5, 4, 4, 4, 4, 4, 4, 4]),
    (Parallel(tp=4), 2, [1, 0, 1, 0]),
    (Parallel(tp=2), 0, [0, 0]),
])
def test_named_cuts(parallel: Parallel, size: int, widths: list[int]) -> None:
    """The documented rule, by hand: cut at ceil(N * shares so far / all shares)."""
    assert [stop - start for start, stop in parallel.ranges(size)] == widths


def test_all_faults_at_once() -> None:
    """A wrong degree, schedule and shares in one message."""
    with pytest.raises(UsageValueError) as caught:
        Parallel(tp=0, ep=-1, schedule="ring", splits=(1, -1))
    for fault in ("tp=0", "ep=-1", "schedule='ring'", "splits has 2 shares", "splits=(1, -1)"):
        assert fault in str(caught.value)


def test_shares_from_a_list() -> None:
    """A file has shares as a list: the same value, usable as a key, and the same text, which ranks compare."""
    given = Parallel(tp=2, splits=[1, 2], schedule="all_reduce")  # type: ignore[arg-type]
    plain = Parallel(tp=2, splits=(1, 2))
    assert given == plain
    assert hash(given) == hash(plain)
    assert repr(given) == repr(plain)


@pytest.mark.parametrize("splits", [3, "12", {1: 1, 2: 2}])
def test_shares_that_are_no_sequence(splits: object) -> None:
    """A number has no length; letters and keys in the place of shares are a mistake too."""
    with pytest.raises(UsageValueError, match="but should be a tuple of one share per rank, or None"):
        Parallel(tp=2, splits=splits)  # type: ignore[arg-type]


def test_a_rank_of_the_group() -> None:
    """-1 would be read from the end, and True as 1."""
    parallel = Parallel(tp=3)
    for rank in range(3):
        parallel.check_rank(rank)
    for rank in (-1, 3, 1.0, True, None):
        with pytest.raises(UsageValueError, match=f"rank={rank}, but should be an integer .* below tp=3"):
            parallel.check_rank(rank)  # type: ignore[arg-type]


def test_every_parameter_has_a_placement() -> None:
    """A new weight without a rule would be replicated by accident."""
    assert set(PLACEMENTS) == set(MoEWeights.__dataclass_fields__)


def test_placements_are_megatron() -> None:
    """w13 is cut by output and w2 by input, so act needs no communication; both cut the axis I."""
    for name, dim in (("w13_EGIH", 2), ("w2_EHI", 2), ("shared_w13_GIH", 1), ("shared_w2_HI", 1)):
        assert PLACEMENTS[name].shard_dim == dim
        assert PLACEMENTS[name].kind == ("colwise" if "w13" in name else "rowwise")
    for name in ("router_EH", "selection_bias_E", "shared_gate_SH"):
        assert PLACEMENTS[name].shard_dim is None
