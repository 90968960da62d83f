"""Protects who holds what: tokens, columns and experts of every rank, and which copy of an expert serves a slot."""

from itertools import product

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_ref.contract import hosting
from moe_ref.contract.case import Case
from moe_ref.contract.case_id import format_case, parse_case
from moe_ref.contract.errors import UsageValueError
from moe_ref.contract.hosting import serving_copies
from moe_ref.contract.parallel import Parallel
from moe_ref.contract.shares import rank_shares
from moe_ref.contract.vocabulary import Hosting, Schedule, Tokens
from moe_ref.contract.volume import transfers

PLAIN = "v1-T33.H96.I160.E8.K2-bf16-norm"
SPREAD = ("tp3", "tp2-split1.0", "ep2", "tp2-ep3-roundrobin-copy0.7", "tp4-gather",
          "tp2-reducescatter-tokenstp-share0.1", "tp2-ep2-tokensep-share1.3",
          "tp2-ep2-reducescatter-tokensboth-share3.0.1.2", "tp2-allreducerows-wholeshared")


def case(words: str) -> Case:
    """The plain layer, spread."""
    return parse_case(f"{PLAIN}-{words}")


@pytest.mark.parametrize("words", SPREAD)
def test_ids_of_spread_layers(words: str) -> None:
    """The id is the case, also where it says how the layer is spread."""
    assert format_case(case(words)) == f"{PLAIN}-{words}"


@pytest.mark.parametrize("words", SPREAD)
def test_every_token_and_column_has_its_owners(words: str) -> None:
    """A token is on one rank along each axis that shards tokens; each ep rank's tp ranks share out the columns."""
    shares, parallel = rank_shares(case(words)), case(words).parallel
    copies = parallel.size // case(words).num_token_parts
    held = [token for share in shares for token in range(*share.tokens)]
    assert sorted(held) == sorted(list(range(33)) * copies)
    for ep_rank in range(parallel.ep):
        group = shares[ep_rank * parallel.tp:(ep_rank + 1) * parallel.tp]
        assert [column for share in group for column in range(*share.columns)] == list(range(160))
        assert {share.merged_tokens for share in group} == {group[0].merged_tokens}
        assert set(range(*group[0].merged_tokens)) == {token for share in group for token in range(*share.tokens)}


def test_uneven_tokens_by_hand() -> None:
    """33 tokens by shares 3, 0, 1, 2: cuts at ceil(33 * (0, 3, 3, 4, 6) / 6)."""
    shares = rank_shares(case("tp2-ep2-reducescatter-tokensboth-share3.0.1.2"))
    assert [share.tokens for share in shares] == [(0, 17), (17, 17), (17, 22), (22, 33)]
    assert [share.merged_tokens for share in shares] == [(0, 17), (0, 17), (17, 33), (17, 33)]


@pytest.mark.parametrize(("rule", "expected"), [
    (Hosting.CONTIGUOUS, ((0, 1, 2, 3), (4, 5, 6), (7, 0, 5))),
    (Hosting.ROUND_ROBIN, ((0, 3, 6, 5), (1, 4, 7), (2, 5, 0))),
])
def test_hosted_experts_by_hand(rule: Hosting, expected: tuple[tuple[int, ...], ...]) -> None:
    """Copies follow the experts as further places and are dealt out with them; 10 places over 3 ranks are 4, 3, 3."""
    assert Parallel(ep=3, hosting=rule, redundant=(0, 5)).hosted(8) == expected


def test_fewer_experts_than_ranks() -> None:
    """A rank may host none."""
    assert Parallel(ep=4).hosted(2) == ((0,), (), (1,), ())
    assert [e for experts in Parallel(ep=4).hosted(2) for e in experts] == [0, 1]


@pytest.mark.parametrize(("rule", "redundant"), list(product(Hosting, [(), (0, 5), (3, 3)])))
def test_each_slot_is_served_once(rule: Hosting, redundant: tuple[int, ...]) -> None:
    """By a rank that hosts its expert, at that expert's place; copies take tokens in turn; other ids by nobody."""
    parallel = Parallel(ep=3, hosting=rule, redundant=redundant)
    hosted = parallel.hosted(8)
    ids_TK = torch.tensor([[t % 8, (3 * t + 1) % 8, -1, 8] for t in range(24)])
    rank_TK, place_TK = serving_copies(ids_TK, parallel, 8)
    assert bool((rank_TK[:, 2:] == -1).all())
    assert bool((place_TK[:, 2:] == -1).all())
    for (t, k) in product(range(24), range(2)):
        assert hosted[int(rank_TK[t, k])][int(place_TK[t, k])] == int(ids_TK[t, k])
    for e in range(8):
        places = {(rank, index) for rank, experts in enumerate(hosted) for index, held in enumerate(experts)
                  if held == e}
        used = {(int(rank_TK[t, k]), int(place_TK[t, k])) for t, k in product(range(24), range(2))
                if ids_TK[t, k] == e}
        assert used == places, f"expert {e}"


def test_tables_of_copies_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made in every call they would be copied to the device, which waits for it and cannot be captured in a graph.

    Fake tensors have their own: they cannot meet real ones, before or after.
    """
    parallel, ids_TK = Parallel(ep=3), torch.tensor([[0, 5, 2], [4, 7, -1]])
    monkeypatch.setattr(hosting, "_TABLES", {})
    with FakeTensorMode() as mode:
        serving_copies(mode.from_tensor(ids_TK), parallel, 6)
    assert not hosting._TABLES
    with torch.inference_mode():
        first = serving_copies(ids_TK, parallel, 6)
    monkeypatch.setattr(hosting, "_make_tables", None)
    again = serving_copies(ids_TK, parallel, 6)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    monkeypatch.undo()
    with FakeTensorMode() as mode:
        assert serving_copies(mode.from_tensor(ids_TK), parallel, 6)[0].shape == ids_TK.shape


@pytest.mark.parametrize(("arguments", "words"), [
    ({"tp": 2, "tokens": "sharded_tp"}, "schedule=reduce_scatter"),
    ({"ep": 2, "schedule": "gather"}, "ep=1 and replicated tokens"),
    ({"hosting": "round_robin"}, "with ep=1 one rank hosts every expert"),
    ({"redundant": (0,)}, "with ep=1"),
    ({"tokens": "sharded_ep"}, "with ep=1"),
    ({"ep": 2, "redundant": (-1,)}, "redundant=(-1,)"),
    ({"tp": 2, "splits": (0, 0)}, "one of them above"),
    ({"ep": 2, "hosting": "striped"}, "contiguous, round_robin"),
])
def test_what_excludes_each_other(arguments: dict, words: str) -> None:
    """Said when the degrees are put together, with what was given."""
    with pytest.raises(UsageValueError) as caught:
        Parallel(**arguments)
    assert words in str(caught.value)


def test_a_copy_of_no_expert() -> None:
    """The number of experts is the layer's, so this shows when the two meet."""
    with pytest.raises(UsageValueError, match=r"redundant=\(9,\), but the layer has experts 0 to 7"):
        Parallel(ep=2, redundant=(9,)).hosted(8)


@pytest.mark.parametrize(("words", "message"), [
    ("tp2-share1.1", "nothing is shared out"), ("tp2-reducescatter-tokenstp-share1.1.1", "2 parts"),
    ("tp2-reducescatter-tokenstp-share0.0", "one of them above"),
])
def test_shares_of_tokens_that_do_not_fit(words: str, message: str) -> None:
    """One share per part, and only where tokens are sharded."""
    with pytest.raises(UsageValueError, match=message):
        case(words)


@pytest.mark.parametrize(("text", "message"), [
    ("v1-T33.H96.I160.E8.K2-bf16-norm-cap5-ep2-tokensep", "capacity counts all tokens"),
    (f"{PLAIN}-ep2-copy8", "the layer has experts 0 to 7"),
])
def test_layers_that_cannot_be_spread_so(text: str, message: str) -> None:
    """Told when the case is read, before any rank starts."""
    with pytest.raises(UsageValueError, match=message):
        parse_case(text)


VOLUMES = {
    # T*H = 33*96; with 2 ranks 17 and 16 tokens, 80 columns each of I and 48 of H; 2 slots per token.
    "tp2": [("tp.all_reduce", 3168)],
    "tp2-allreducerows": [("tp.all_reduce", 6336)],
    "tp2-reducescatter": [("tp.reduce_scatter", 3168), ("tp.all_gather", 17 * 96)],
    "tp2-gather": [("tp.broadcast", 3168), ("tp.all_gather", 66 * 80), ("tp.all_gather", 33 * 48)],
    "tp2-reducescatter-tokenstp": [("tp.all_gather", 17 * 96), ("tp.all_gather", 34), ("tp.all_gather", 34),
                                   ("tp.reduce_scatter", 3168)],
    "ep2": [("ep.all_reduce", 3168)],
    "tp2-ep2": [("tp.all_reduce", 3168), ("ep.all_reduce", 3168)],
    "tp2-ep2-reducescatter": [("tp.reduce_scatter", 3168), ("ep.all_reduce", 17 * 96), ("tp.all_gather", 17 * 96)],
    "ep2-tokensep": [("ep.all_to_all", 34 * 96), ("ep.all_to_all", 34), ("ep.all_to_all", 34),
                     ("ep.all_to_all", 30 * 96)],
}


@pytest.mark.parametrize("words", VOLUMES)
def test_volumes_by_hand(words: str) -> None:
    """What rank 0 hands over, call by call; 34 slots start from it and 30 end at it where rows travel."""
    planned = transfers(case(words), rank_shares(case(words))[0], rows_sent=34, rows_served=30)
    assert [(one.name, one.num_elements) for one in planned] == VOLUMES[words]


def test_the_words_are_distinct() -> None:
    """No word of a schedule is one of tokens; every value but the default has a word."""
    ids = {format_case(case(words)) for words in SPREAD}
    assert len(ids) == len(SPREAD)
    assert {parse_case(one).parallel.schedule for one in ids} == set(Schedule)
    assert {parse_case(one).parallel.tokens for one in ids} == set(Tokens)
