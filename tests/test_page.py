"""The page: what a reader is led to first, what it leaves out when there is much, contrast, landmarks, its one script.

Runs are built by hand (tests/made_records.py); their shared looks are checked in a browser by eye.
"""

import base64
import hashlib
import re
from functools import cache
from itertools import product

import msgspec
import pytest

from moe_ref.contract.vocabulary import Verdict
from moe_ref.records.schema import CaseLine, DiagnosisLine, Statistic
from moe_ref.records.store import Run
from moe_ref.report.baseline import baseline_of
from moe_ref.report.compare import compare
from moe_ref.report.evidence import Evidence
from moe_ref.report.failure_groups import failure_groups
from moe_ref.report.head import head_lines
from moe_ref.report.page import page
from moe_ref.report.sections.cases import environment_section
from moe_ref.report.sections.failures import failure_section
from moe_ref.report.sections.places import CARDS_SHOWN, ROWS_SHOWN, anchors, shown_rows
from moe_ref.report.sections.view import View, drawing
from moe_ref.report.separation import Axes, Separation
from moe_ref.report.words import excess, format_ratio
from tests.made_records import EMPTY_TP4, PLAIN, SIZES, TP2, TP4, failing, idle, make_run, passing, stage
from tests.page_reader import Reader, own_script


def page_of(run: Run, before: Run | None = None) -> str:
    comparison = compare(run, baseline_of(before)) if before else None
    return page(Evidence(run), head_lines(run, comparison), comparison)


@cache
def plain_page() -> str:
    """Of a run with one failure that passed before."""
    return page_of(make_run(passing(PLAIN), failing(TP2)), before=make_run(passing(PLAIN), passing(TP2)))


def failure_html(*lines: CaseLine) -> str:
    """The section of failures alone, of a run of these lines."""
    run, groups = make_run(*lines), failure_groups(lines)
    return failure_section(View(Evidence(run), lines, anchors(lines, groups), None, groups))


def failures_of(*lines: CaseLine) -> Reader:
    return Reader(failure_html(*lines))


def seeds(number: int, suffix: str = "") -> list[str]:
    return [f"{SIZES}-s{seed}{suffix}" for seed in range(1, number + 1)]


# --- failures -------------------------------------------------------------------------------------


def test_one_defect_is_one_group_whose_smallest_case_comes_first() -> None:
    """40 cases that start in one stage are one thing to look at, and not hidden by a single one that starts earlier."""
    early = msgspec.structs.replace(failing(PLAIN), first_stage="act")
    groups = failure_groups([early, *map(failing, seeds(40, "-tp4")), failing(TP2), idle(TP4, "crash", "bus error")])
    assert [(group.name, len(group.lines)) for group in groups] == [("down", 41), ("act", 1), ("crash", 1)]
    assert groups[0].lines[0].case == TP2
    assert [group.is_stage for group in groups] == [True, True, False]


def test_new_failures_lead_their_group_and_groups_with_new_ones_lead() -> None:
    crashed = idle(EMPTY_TP4, "crash", "bus error")
    groups = failure_groups([failing(PLAIN), failing(TP2), failing(TP4), crashed], new={EMPTY_TP4})
    assert [(group.name, group.num_new) for group in groups] == [("crash", 1), ("down", 0)]
    assert failure_groups([failing(PLAIN), failing(TP4)], new={TP4})[0].lines[0].case == TP4


def test_what_separates_failures_is_said_even_where_they_share_no_value() -> None:
    """A missing all-reduce fails at tp 2 and tp 4 alike: no single value is shared, yet tp tells all."""
    broken = seeds(6, "-tp2") + seeds(6, "-tp4")
    found = Axes(seeds(12) + broken).separating(broken)
    assert found == [Separation("tp", (("1", 0, 12), ("2", 6, 6), ("4", 6, 6)))]
    text = failures_of(*map(passing, seeds(12)), *map(failing, broken)).text
    assert "12 of 24 start in down (the down projection)" in text
    assert "tp 2 (6 of 6), 4 (6 of 6); never 1 (12 ran)" in text


def test_chance_does_not_separate() -> None:
    """One failure, nearly all cases, or every other seed: nothing of the case explains them."""
    ran = seeds(40)
    assert [Axes(ran).separating(cases) for cases in (ran[:1], ran[:39], ran[::2])] == [[], [], []]


def test_a_card_says_where_how_far_and_what_it_looks_like() -> None:
    explained = msgspec.structs.replace(
        failing(TP2), diagnosis=DiagnosisLine(fault="gate and up exchanged", share=0.999, next_share=0.04),
        reason="down: 41x over bound\ntp.all_reduce of 64 elements missing", purpose="plain layer, tp 2")
    text = " ".join(failures_of(passing(PLAIN), explained).text.split())
    for words in ("gate and up exchanged (explains 99.9% of the error, the next best fault 4%)",
                  "where expert 5, rank 1, tile 1 of 2, tokens 7-8", "off by 41x its bound; 3 of 64 elements",
                  "also tp.all_reduce of 64 elements missing", "worst element down[rank 1, token 7, slot 0, expert 5, ",
                  "case plain layer, tp 2", "act 0.25", f"moe-ref replay {TP2} --impl moe_fast"):
        assert words in text
    unlikely = msgspec.structs.replace(failing(TP2), stages=[msgspec.structs.replace(stage("down", 41.0), ratio=9e4)])
    assert "off by 41x its bound, 90000x what is likely; 3 of" in " ".join(failures_of(unlikely).text.split())
    guessed = msgspec.structs.replace(failing(TP2), message="down: 41x\n  likely  looks like 1/4 of the sum")
    assert "looks like 1/4 of the sum" in " ".join(failures_of(guessed).text.split())


def test_a_statistic_that_fails_alone_is_named_with_what_it_may_be() -> None:
    """Every element of the output is inside its bound; the sum of their errors is not."""
    output = msgspec.structs.replace(stage("output", 0.8), statistics=[
        Statistic(name="rms", value=1.0, allowed=1.2), Statistic(name="slots", value=9.5, allowed=4.0, expert=5)])
    line = msgspec.structs.replace(failing(TP2), first_stage="output", stages=[output], reason="output: slots")
    text = failures_of(line).text
    assert "slots 9.5 of at most 4 (expert 5) FAIL; rms 1 of at most 1.2" in text


def test_beyond_what_is_likely_is_not_called_beyond_the_bound() -> None:
    inside = msgspec.structs.replace(stage("down", 7.0), bound_ratio=0.5)
    assert [excess(stage("down", 506.0)), excess(inside), excess(stage("down", "nan"))] == [
        "506x its bound", "7x what is likely", "error / allowed is nan"]
    assert [format_ratio(ratio) for ratio in (99.4, 99.6, 5064.0, 99_951.0)] == ["99", "100", "5060", "1e+05"]


def test_known_failures_and_harness_errors_stand_apart_with_their_reasons() -> None:
    known = [idle(case, "known_failure", "issue 12: cut stores\ndown: 3x over bound") for case in seeds(3)]
    text = failures_of(*known, idle(TP2, "harness_error", "no power\nTraceback")).text
    assert "Failures: 0" in text
    assert "Known failures: 3" in text
    assert "issue 12: cut stores" in text
    assert "Harness errors: 1" in text
    assert "Traceback" in text


def test_what_is_copied_into_a_terminal_is_one_line_without_control_characters() -> None:
    hostile = msgspec.structs.replace(failing(TP2), replay="moe-ref replay\nrm -rf /\x1b[2J\u202e")
    copied = re.findall(r'<pre class="copy">(.*?)</pre>', failure_html(hostile), re.DOTALL)
    assert copied == ["moe-ref replay rm -rf / [2J "]


def test_a_drawing_keeps_its_words_and_loses_idle_digits() -> None:
    made = drawing('<svg>\n   <path d="M 1.23456 2 \nL 3.0001 4"/>\n <text x="0.12345">0.12345</text></svg>')
    assert made == ('<div class="plot"><svg><path d="M 1.23 2 \nL 3.00 4"/><text x="0.12">0.12345</text></svg></div>')
    assert drawing("") == ""


# --- much of everything -----------------------------------------------------------------------------


def test_a_large_run_stays_small_and_says_what_it_leaves_out() -> None:
    """Rare verdicts are whole, cards and rows have limits, and no link leads nowhere."""
    lines = [*map(passing, seeds(ROWS_SHOWN + 500)), *map(failing, seeds(CARDS_SHOWN + 7, "-tp2")),
             *(idle(case, "unsupported", f"not declared: {case}") for case in seeds(60, "-tp4"))]
    html = page_of(make_run(*lines))
    found = Reader(html)
    assert len(html) < 900_000
    assert html.count('<details class="failure"') == CARDS_SHOWN
    assert "7 more cases are not shown here; report.json holds all." in found.text
    assert "pass: 2500, the first 1893" in found.text
    assert "20 more reasons are not shown here" in found.text
    assert {link[1:] for link in found.links if link.startswith("#")} <= set(found.ids)
    assert len(found.ids) == len(set(found.ids))


def test_long_texts_are_cut() -> None:
    """A reason or message of a megabyte, as a library's dump may be, is not a page of forty."""
    text = "a library's dump " * 60_000
    lines = [msgspec.structs.replace(failing(TP2), message=text, reason=text, purpose=text),
             *(idle(case, verdict, text) for case, verdict in zip((PLAIN, TP4, EMPTY_TP4), (
                 "crash", "known_failure", "unsupported"), strict=True))]
    assert len(page_of(make_run(*lines))) < 150_000


def test_rows_are_shared_so_that_rare_verdicts_are_whole() -> None:
    lines = [*map(passing, seeds(5000)), *(idle(case, "unsupported", "") for case in seeds(3000, "-tp2")),
             failing(TP4)]
    rows = shown_rows(lines)
    assert {verdict: len(found) for verdict, found in rows.items()} == {
        Verdict.MISMATCH: 1, Verdict.PASS: 1000, Verdict.UNSUPPORTED: 999}


def test_as_many_groups_as_cards_leave_one_card_each() -> None:
    lines = [msgspec.structs.replace(failing(case), first_stage=f"stage{number}")
             for number, case in enumerate(seeds(CARDS_SHOWN + 5))]
    found = failures_of(*lines)
    assert f"Failures: {CARDS_SHOWN + 5}" in found.text
    assert "And 5 more groups: 5 failures, all in report.json." in found.text


# --- reading ------------------------------------------------------------------------------------------


def test_keyboards_and_screen_readers_find_their_way() -> None:
    """A skip link first, landmarks, one first heading, every section named by its own heading."""
    html = plain_page()
    found = Reader(html)
    assert {"header", "nav", "main", "footer", "h1"} <= found.tags
    assert html.count("<h1>") == html.count("<main>") == 1
    body = html[html.index("<body>"):]
    assert body.index('<a class="skip" href="#failures">') < body.index("<nav")
    named = re.findall(r'<section[^>]* aria-labelledby="([^"]+)"', html)
    assert len(named) == html.count("<section")
    assert set(named) <= set(re.findall(r'<h[23] id="([^"]+)"', html))
    assert 'lang="en"' in html
    assert re.findall(r"<thead>.*?<th>", html[html.index('id="matrix"'):html.index('id="length"')]) == []


def test_without_scripts_only_the_filter_is_missing() -> None:
    html = plain_page()
    assert re.findall(r"<[^>]* hidden[ >]", html) == ['<div id="filter" role="search" hidden>']
    assert "<button" not in html


def test_the_policy_lets_this_script_run_and_no_other() -> None:
    html = plain_page()
    [policy] = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', html)
    digest = base64.b64encode(hashlib.sha256(own_script().encode()).digest()).decode()
    assert Reader(html).scripts == [own_script()]
    assert policy == (f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'; "
                      "base-uri 'none'; form-action 'none'")


def test_environment_begins_with_what_decides_how_sums_are_judged() -> None:
    run = make_run(passing(PLAIN), hardware="sm90", hardware_reason="its fingerprint", a_host="n1")
    rows = re.findall(r'<th scope="row">(.*?)</th>', environment_section(View(Evidence(run), (), {})))
    assert rows[:3] == ["device", "hardware", "hardware reason"]
    assert rows[-1] == "a host"


# --- contrast -----------------------------------------------------------------------------------------


def _themes() -> dict[str, dict[str, str]]:
    """Colour variables by theme; the dark ones stand in the second block."""
    blocks = re.findall(r":root \{(.*?)\}", plain_page(), re.DOTALL)
    light, dark = (dict(re.findall(r"--([\w-]+): (#[0-9a-f]{3,6});", block)) for block in blocks)
    return {"light": light, "dark": light | dark}


def _channels(colour: str) -> tuple[float, ...]:
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    return tuple(int(digits[at:at + 2], 16) / 255 for at in (0, 2, 4))


def _luminance(channels: tuple[float, ...]) -> float:
    """Relative luminance, as WCAG 2.2 defines it."""
    linear = [one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_has_contrast_in_both_themes(theme: str) -> None:
    """4.5 to 1 at least (WCAG 2.2, AA), on plain and shaded ground, on badges and on every shade of the matrix."""
    colours = _themes()[theme]
    pairs = [*product(("ink", "dim", "link", "bad"), ("page", "soft")), ("page", "bad"), ("page", "good")]
    assert {pair: ratio for pair in pairs
            if (ratio := _contrast(*(_channels(colours[name]) for name in pair))) < 4.5} == {}
    shares = [int(share) / 100 for share in re.findall(r"^\.level\d \{.*?var\(--heat\) (\d+)%", plain_page(), re.M)]
    heat, ground, ink = (_channels(colours[name]) for name in ("heat", "page", "ink"))
    shades = {share: tuple(share * one + (1 - share) * other for one, other in zip(heat, ground, strict=True))
              for share in shares}
    assert len(shades) == 8
    assert [share for share, shade in shades.items() if _contrast(ink, shade) < 4.5] == []
