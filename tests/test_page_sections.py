"""Sections of the page that are made of other records than the matrix's, and what they say where there are none."""

from html.parser import HTMLParser

import msgspec

from moe_ref.records.growth import BandResult, DifferenceLine
from moe_ref.records.schema import CaseLine
from moe_ref.records.score import MutantOutcome, RightOutcome
from moe_ref.records.store import Run
from moe_ref.report.axes import ladder_step, rows_per_expert
from moe_ref.report.bench import NO_EVIDENCE, timing_tables
from moe_ref.report.evidence import Evidence
from moe_ref.report.facts import case_lines
from moe_ref.report.growth import law_table
from moe_ref.report.ladders import ladders
from moe_ref.report.load_plot import plot_against_rows
from moe_ref.report.page import page
from moe_ref.report.pairs import Together, pair_grid
from moe_ref.report.sections.absent import absent_section
from moe_ref.report.sections.bench import bench_section
from moe_ref.report.sections.compiled import compiled_section
from moe_ref.report.sections.curves import ladder_section
from moe_ref.report.sections.growth import growth_section
from moe_ref.report.sections.pairs import pair_section
from moe_ref.report.sections.score import score_section
from moe_ref.report.sections.view import View
from tests.made_evidence import (
    bench_run,
    combination,
    compiled_run,
    growth_line,
    growth_run,
    point,
    score_run,
    timing,
)
from tests.made_records import PLAIN, SIZES, TP2, TP4, failing, idle, make_run, passing

RUN = make_run(passing(PLAIN))
HOSTILE = "</td><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7*7 }}"


MAKERS = {"absent": absent_section, "bench": bench_section, "compiled": compiled_section, "growth": growth_section,
          "ladder": ladder_section, "pairs": pair_section, "score": score_section}


class Read(HTMLParser):
    """Texts, tags, ids and links of HTML."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html, self.text = html, ""
        self.tags: set[str] = set()
        self.ids: list[str] = []
        self.links: set[str] = set()
        self.cells: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.ids += [value for name, value in attrs if name == "id" and value]
        self.links |= {value for name, value in attrs if name in ("href", "src") and value}

    def handle_data(self, data: str) -> None:
        self.text += data
        self.cells.append(data.strip())


def section(name: str, run: Run = RUN, **evidence: object) -> Read:
    """One section of a page."""
    cases = case_lines(run)
    anchors = {case: f"case-{number}" for number, case in enumerate(cases)}
    return Read(MAKERS[name](View(Evidence(run, **evidence), tuple(cases.values()), anchors)))  # pyrefly: ignore


def mutant(name: str, outcome: str = "caught", **fields: object) -> MutantOutcome:
    return MutantOutcome(id=name, outcome=outcome, tried=3, owned=True, **fields)  # pyrefly: ignore


# What was not run


def test_what_a_report_has_no_records_of_is_said_with_the_command_that_makes_them() -> None:
    """Silence would read as green."""
    found = section("absent")
    for words in ("how errors grow with K", "moe-ref diverge", "mutation score", "moe-ref score --record",
                  "cross-compiling", "moe-ref compile moe_fast --record", "speed", "moe-ref bench moe_fast --record"):
        assert words in found.text
    partly = section("absent", bench=(bench_run(timing("moe_fast", 8, 1e-3)),))
    assert "speed" not in partly.text
    assert "mutation score" in partly.text
    assert [section(name).html for name in ("growth", "score", "compiled", "bench")] == [""] * 4


def test_a_report_with_everything_misses_nothing_and_stays_one_inert_page() -> None:
    """Every free text of every record tries to break out; every link leads somewhere on the page."""
    evidence = Evidence(
        make_run(passing(PLAIN), passing(TP2), failing(TP4)),
        growth=(growth_run(growth_line(HOSTILE, faults=[HOSTILE], reason=HOSTILE, growth_class=HOSTILE),
                           differences=[DifferenceLine(run="r1", first=HOSTILE, second=HOSTILE, terms=2048,
                                                       relative="nan", answer=HOSTILE, verdict=HOSTILE)]),),
        bench=(bench_run(timing(HOSTILE, 8, 1e-3), timing("other", 8, 1, "CRASHED", HOSTILE)),),
        score=score_run(mutant("A01." + HOSTILE, "missed", reason=HOSTILE)),
        compiled=(compiled_run(combination(f"sm_90 {HOSTILE.replace(' ', '')} | ", faults=[HOSTILE]),
                               table=HOSTILE, missing=[HOSTILE]),))
    whole = Read(page(evidence, ["FAIL  made by hand"]))
    assert {"growth", "bench", "score", "compiled"} <= set(whole.ids)
    assert "absent" not in whole.ids
    assert "<script>alert" not in whole.html
    assert "img" not in whole.tags
    assert "{{ 7*7 }}" in whole.text
    assert {link[1:] for link in whole.links if link.startswith("#")} <= set(whole.ids)
    assert {link for link in whole.links if not link.startswith(("#", "data:image/png;base64,"))} == set()


def test_numbers_that_no_run_makes_lose_no_section() -> None:
    """Zeros, infinities and empty lists are records still: they are words in a table, and no points of a plot."""
    odd = ("nan", "inf", "-inf", 0.0, -1.0, 1e308)
    lines = [growth_line(f"odd {value}", curves={"unit": [point(1024, value), point(2048, 1e-7)]}, exponent=value,
                         bits=(value, value), band=BandResult(exponent=(value, value), bits=(value, value)))
             for value in odd]
    run = growth_run(*lines, growth_line("empty", curves={"unit": []}), growth_line("no length", curves={
        "unit": [point(0, 1e-7)]}))
    run.header = msgspec.structs.replace(run.header, data=["unit", "nothing"], sizes={})
    assert "svg" in (found := section("growth", growth=(run,))).tags
    assert "? x ? outputs, tp ?" in found.text
    times = bench_run(*(msgspec.structs.replace(timing(f"odd {value}", 8, 1e-3), seconds=(value,) * 3, flop=value)
                        for value in odd))
    times.limits["copy"] = msgspec.structs.replace(times.limits["copy"], per_s=0.0)
    assert "odd -inf" in section("bench", bench=(times,)).text
    assert "0 of 2 entries" in section("score", score=score_run(mutant(""))).text
    nothing = compiled_run(combination("sm_90 a_kernel | | ", worse=["x"] * 60), missing=[""])
    assert "and 11 more" in section("compiled", compiled=(nothing,)).text


# Divergence


def test_curves_of_a_model_are_marked_as_predicted() -> None:
    """A curve that no kernel made must not pass for a measurement."""
    run = growth_run(growth_line("moe_fast:bf16", "PREDICTED", reason="no CUDA device"), growth_line("torch:loop"),
                     growth_line("torch:grouped", "NOT RUN", reason="torch says no", curves={}, growth_class=""))
    found = section("growth", growth=(run,))
    assert {"PREDICTED", "NOT RUN", "MEASURED"} <= set(found.cells)
    assert "moe_fast:bf16 (PREDICTED)" in found.text, "in the legend of the plot"
    assert "PREDICTED moe_fast:bf16: no CUDA device" in found.text
    assert "svg" in found.tags
    for row in law_table(run).rows:
        assert set(row) <= set(found.cells), "the page's table is the terminal's"
    assert "0.2..0.8; 23..26" in found.cells, "the band"


def test_faults_of_growth_stand_before_curves_and_a_difference_has_its_verdict() -> None:
    line = growth_line("mine:kernel", faults=["exponent 1.2, but should be at most 0.8"])
    difference = DifferenceLine(run="r1", first="mine:kernel", second="torch:loop", terms=2048, relative=0.02,
                                answer="yes", verdict="mine:kernel differs. Is it a bug? Yes: expert 3 is missing.")
    run = growth_run(line, growth_line("torch:loop"), differences=[difference], exit_code=1)
    found = section("growth", growth=(run,))
    assert found.text.index("mine:kernel: exponent 1.2") < found.text.index("K, terms of a sum")
    assert found.cells.index("FAIL") < found.cells.index("mine:kernel")
    assert {"YES", "Yes: expert 3 is missing."} <= set(found.cells)


def test_a_run_of_growth_without_a_curve_draws_nothing() -> None:
    run = growth_run(growth_line("torch:grouped", "NOT RUN", reason="torch says no", curves={}, growth_class=""))
    found = section("growth", growth=(run,))
    assert "svg" not in found.tags
    assert "No error above 0 was recorded." in found.text


def test_curves_of_zero_error_are_no_points_of_a_log_axis() -> None:
    """A subject that is right to the bit has a row and no curve."""
    run = growth_run(growth_line("exact:kernel", curves={"unit": [point(1024, 0.0), point(2048, 0.0)]}))
    assert "exact:kernel" in section("growth", growth=(run,)).text


# Score


def test_missed_and_accused_are_named_before_any_table() -> None:
    """They are what somebody has to mend; a table of a hundred caught ones is not."""
    accused = RightOutcome(id="right.wide", executed=3, passed=2, not_run=0, unsupported=0, red=["v1-case: down"])
    run = score_run(mutant("A01.one"), mutant("A01.two", "missed"), mutant("B01.gpu", "not_runnable", reason="no GPU"),
                    accused)
    found = section("score", score=run)
    table = found.text.index("Mutants by class of defect")
    assert found.text.index("missed A01.two: 3 cases tried") < table
    assert found.text.index("accused right.wide: v1-case: down") < table
    assert "1 of 2 mutants caught" in found.text
    assert "1 for a GPU alone" in found.text
    assert "B01.gpu: no GPU" in found.text


def test_entries_without_a_mutant_are_not_run() -> None:
    """The score of a part of the catalogue is not the catalogue's."""
    found = section("score", score=score_run(mutant("A01.one")))
    assert "1 of 2 entries of the catalogue are judged here; NOT RUN: B01." in found.text


# Cross-compile


def test_what_is_worse_than_accepted_stands_before_the_table() -> None:
    run = compiled_run(combination("sm_80 a_kernel | | "),
                       combination("sm_90 b_kernel | | ", worse=["100 registers, accepted were 80"]),
                       missing=["sm_90 lost_kernel | | "])
    found = section("compiled", compiled=(run,))
    table = found.text.index("the most that a combination takes")
    for words in ("b_kernel on sm_90: 100 registers, accepted were 80", "lost_kernel on sm_90: accepted, but"):
        assert found.text.index(words) < table
    assert found.cells.index("b_kernel") < found.cells.index("a_kernel"), "kernels with failures first"
    assert "2 combinations, 2 failures" in found.text


# Speed


def test_times_of_a_cpu_are_marked_in_the_heading() -> None:
    """They stand beside times that are evidence, and must not be taken for them."""
    lines = timing("moe_fast", 8, 1e-3), timing("torch:loop", 8, 2e-3)
    cpu = section("bench", bench=(bench_run(*lines, evidence=False),))
    assert NO_EVIDENCE in cpu.html.partition("</h2>")[0]
    gpu = section("bench", bench=(bench_run(*lines),))
    assert NO_EVIDENCE not in gpu.text


def test_times_stand_beside_peers_of_the_run_and_who_is_wrong_has_none() -> None:
    run = bench_run(timing("moe_fast", 8, 1e-3), timing("torch:loop", 8, 2e-3),
                    timing("fast:kernel", 8, 1e-4, "WRONG", "ratio 3 is above 1"))
    found = section("bench", bench=(run,))
    (table,) = timing_tables(run)
    for row in table.rows:
        assert {cell for cell in row if cell} <= set(found.cells), "the page's table is the terminal's"
    assert {"2.00", "WRONG"} <= set(found.cells)
    assert "WRONG fast:kernel: ratio 3 is above 1" in found.text
    assert "svg" in found.tags


# Ladders and loads


def rated(case: str, ratio: float) -> CaseLine:
    return passing(case, act=ratio, down=ratio)


def test_a_ladder_is_one_case_at_growing_degrees_of_one_axis() -> None:
    """With another schedule, direction or ep the same problem at the same tp is another rung of another ladder."""
    lines = [rated(PLAIN, 0.2), rated(TP2, 0.3), rated(TP2 + "-reducescatter", 0.9), rated(TP2 + "-bwd", 0.8),
             rated(SIZES + "-ep2", 0.4), rated(SIZES + "-tp2-ep2", 0.6), rated(SIZES + "-tp2-split3.1", 0.7),
             rated(SIZES + "-exact", 0.0), rated(SIZES + "-exact-tp2", 0.0)]
    found = {ladder.problem: [(degree, line.case) for degree, line in ladder.steps.items()]
             for ladder in ladders(lines, "tp")}
    assert found == {PLAIN: [(1, PLAIN), (2, TP2)],
                     SIZES + "-ep2": [(1, SIZES + "-ep2"), (2, SIZES + "-tp2-ep2")]}
    assert [(ladder.problem, list(ladder.steps), round(ladder.climb, 6)) for ladder in ladders(lines, "ep")] == [
        (PLAIN, [1, 2], 2.0), (TP2, [1, 2], 2.0)]
    assert ladder_step(SIZES + "-tp2-split3.1", "ep") is None, "shares are of one degree"


def test_ladders_of_both_axes_stand_in_one_section() -> None:
    lines = [rated(PLAIN, 0.2), rated(TP2, 0.3), rated(SIZES + "-ep2", 0.4)]
    found = section("ladder", make_run(*lines))
    assert {"growing tp", "growing ep", "tp 2", "ep 2"} <= set(found.cells)
    assert {"#case-0", "#case-1", "#case-2"} <= found.links
    assert "No case ran at two degrees of tp or of ep." in section("ladder").text


def test_rows_per_expert_are_those_that_the_router_sends_on_average() -> None:
    assert rows_per_expert("v1-T32.H96.I160.E8.K2-bf16") == 8
    assert rows_per_expert("v1-T0.H96.I160.E8.K2-bf16") is None, "no tokens, no load"
    assert rows_per_expert("v1-T32.H96.I160-bf16") is None, "a dense layer routes nothing"
    assert rows_per_expert("of another grammar") is None


def test_loads_that_are_forced_stand_apart() -> None:
    """Where all tokens go to one expert, the mean says little of its load."""
    even, forced = plot_against_rows([rated(PLAIN, 0.2)]), plot_against_rows([rated(SIZES + "-onehot", 0.2)])
    assert "routing as it falls" in even
    assert "forced" not in even
    assert "onehot" in forced
    assert "routing as it falls" not in forced
    assert plot_against_rows([idle(PLAIN, "unsupported", "no")]) == ""


# Pairs


def test_pairs_tell_tested_from_unsupported_from_never_from_impossible() -> None:
    lines = [rated(SIZES, 0.1), rated(SIZES + "-tp2", 0.1), rated(SIZES + "-tp2-ep2-tokensep", 0.1),
             rated(SIZES.replace("bf16", "fp32") + "-zipf", 0.1), idle(SIZES + "-zipf-tp2", "unsupported", "no"),
             idle(SIZES + "-gather-tp4", "unsupported", "foreign id"), idle(SIZES + "-tp3", "not_run", "cut short")]
    grid = pair_grid(lines)

    def together(first: tuple[str, str], second: tuple[str, str]) -> tuple[Together, int]:
        pair = grid.pairs[first, second]
        return pair.together, pair.executed

    bf16 = ("dtype", "bf16")
    assert together(bf16, ("tp", "2")) == (Together.TESTED, 2)
    assert together(("tp", "2"), ("pattern", "zipf")) == (Together.UNSUPPORTED, 0)
    assert together(("dtype", "fp32"), ("ep", "2")) == (Together.NEVER, 0)
    assert together(bf16, ("tp", "3")) == (Together.NEVER, 0), "not run is not tested"
    assert together(("ep", "1"), ("tokens on", "sharded_ep")) == (Together.EXCLUDED, 0), "one ep rank holds all tokens"
    assert together(("dtype", "fp16"), ("tp", "2")) == (Together.NEVER, 0), "of the vocabulary, though no case has it"
    assert ("dtype", "fp16") in grid.untested()
    never = {(pair.first, pair.second) for pair in grid.never()}
    assert (("dtype", "fp32"), ("ep", "2")) in never
    assert not any(("dtype", "fp16") in pair for pair in never), "a value that never ran is said once"


def test_the_grid_of_pairs_is_small_and_left_out_where_few_cases_ran() -> None:
    sizes = [f"v1-T{tokens}.H96.I160.E{experts}.K2" for tokens in (0, 1, 7, 33, 100, 300) for experts in (4, 8)]
    cases = [f"{size}-{dtype}{words}" for size in sizes for dtype in ("fp32", "bf16")
             for words in ("", "-tp2", "-tp3-ep2", "-zipf-tp8", "-tp2-reducescatter", "-ep2-roundrobin", "-bwd")]
    found = section("pairs", make_run(*(rated(case, 0.1) for case in cases)))
    assert len(found.html) < 100_000
    assert 'title="direction bwd x dtype fp16"' in found.html
    assert "Values of which no case ran: dtype fp16" in found.text
    assert section("pairs").html == ""


def test_values_beyond_a_dozen_of_an_axis_are_left_out_of_the_grid() -> None:
    """Ids are foreign text: a thousand degrees must not make a page of a million cells."""
    grid = pair_grid([rated(f"{SIZES}-tp{degree}", 0.1) for degree in range(2, 200)])
    assert len(grid.values["tp"]) == 12
    assert all(msgspec.json.encode(pair.executed) for pair in grid.pairs.values())
