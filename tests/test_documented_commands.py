"""Every command that a document shows is run, or is run elsewhere, or is at least one that its program would accept."""

import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from torch.distributed.run import get_args_parser

from moe_ref.cli.main import cli
from moe_ref.report.accept import accept_run
from moe_ref.report.baseline import baseline_path
from tests.command_line import command
from tests.documented_commands import COMMANDS, PLACEHOLDERS, Elsewhere, Run
from tests.documents import ROOT, Command, commands, figures_left_out, spans, without_comment, written_files
from tests.made_records import TP2, TP4, make_run, passing, write

SCRIPTS = {"ci/verify": ["verify", "moe_fast", "--tier"], "ci/score": ["score"], "ci/compile": ["compile", "moe_fast"]}
"""Scripts that hand their arguments to a verb."""


def test_every_command_is_accounted_for() -> None:
    """A command without a line in tests/documented_commands.py, or a line whose command is gone, is named."""
    shown = {one.text: one.place for one in commands()}
    assert [f"{place}: {text}" for text, place in shown.items() if text not in COMMANDS] == []
    assert COMMANDS.keys() - shown.keys() == set()


@pytest.mark.parametrize("text", [text for text, fate in COMMANDS.items() if isinstance(fate, Elsewhere)])
def test_what_runs_elsewhere_is_there(text: str) -> None:
    fate = COMMANDS[text]
    assert isinstance(fate, Elsewhere)
    lines = (ROOT / fate.file).read_text().splitlines()
    assert any(fate.text in without_comment(line) for line in lines), f"{fate.file} does not hold {fate.text!r}"


def parse(words: list[str], whole: bool) -> None:
    """Raise what the program would say of these arguments; nothing is run. Parts of a command may lack arguments."""
    words = [PLACEHOLDERS.get(word, word) for word in words]
    program, *rest = ["bash", *words] if words[0].startswith("ci/") else words
    if program == "moe-ref":
        parse_verb(rest, whole)
    elif program == "bash" and rest[0] in SCRIPTS:
        assert (ROOT / rest[0]).is_file()
        parse_verb([*SCRIPTS[rest[0]], *(rest[1:] or ["quick"] * (rest[0] == "ci/verify"))], whole)
    elif program == "bash" and rest[0] == "tests/two_hosts.sh":
        parse(rest[1:], whole)
    elif program == "bash" and rest[0] == "ci/gpu":
        parse_script(["-m", "ci.gpu_lane", *rest[1:]])
    elif program == "bash":
        assert (ROOT / rest[0]).is_file(), f"no file {rest[0]}"
    elif program == "torchrun":
        known = get_args_parser().parse_args(rest)
        parse_verb(known.training_script_args, whole)
    elif program == "python":
        parse_script(rest)
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert set(re.findall(r"[\w]+", "".join(re.findall(r"\[(.*)\]", rest[-1])))) <= extras.keys()


def parse_verb(words: list[str], whole: bool) -> None:
    """The arguments of a verb, checked as the command line checks them."""
    verb: click.Command | None = cli
    while isinstance(verb, click.Group) and words:
        name, *words = words
        verb = verb.get_command(click.Context(verb), name)
        assert verb is not None, f"no verb {name}"
    assert verb is not None
    try:
        verb.make_context(verb.name, words)
    except click.MissingParameter:
        if whole:
            raise
    except click.BadOptionUsage as error:
        if whole or "requires an argument" not in str(error):
            raise


def parse_script(words: list[str]) -> None:
    """A program of this repository: its file, and that the options given are options of it."""
    file = ROOT / (words[1].replace(".", "/") + ".py" if words[0] == "-m" else words[0])
    text = file.read_text()
    assert '__name__ == "__main__"' in text, f"{file} is no program"
    unknown = [word for word in words if word.startswith("--") and f'"{word}"' not in text]
    assert unknown == [], f"{file} has no options {unknown}"


@pytest.mark.parametrize("shown", [pytest.param(one, id=one.place) for one in commands()])
def test_commands_are_accepted(shown: Command) -> None:
    """No verb or option that is gone, no value that is none."""
    if re.search(r"[|>]", shown.text) is None:
        parse(shown.words, whole=True)


@pytest.mark.parametrize("shown", [pytest.param(one, id=f"{one.place} {one.text}") for one in spans()])
def test_commands_in_sentences_are_accepted(shown: Command) -> None:
    parse(shown.words, whole=False)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A reader's folder: files that documents tell to write, the checkout as ~/moe-ref, an accepted record as RUN."""
    for name, text in written_files().items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "moe-ref").symlink_to(ROOT)
    run = make_run(passing(TP2), passing(TP4))
    write(run, tmp_path / PLACEHOLDERS["RUN"])
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    accept_run(run, baseline_path(run)).write()
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "mypkg"]:
        del sys.modules[name]


def shortened(shown: Command, fate: Run) -> list[str]:
    """The words of the command with the declared options in place of its own, and a reader's words filled in."""
    words = shown.words
    for option, value in fate.options.items():
        value = str(Path(value).expanduser()) if value.startswith("~") else value
        if option in words:
            words[words.index(option) + 1] = value
        else:
            words += [option, value] if value else [option]
    return [PLACEHOLDERS.get(word, word) for word in words]


def execute(shown: Command, fate: Run) -> int:
    """The exit code; output goes where this process writes."""
    words = shortened(shown, fate)
    if words[0] == "moe-ref":
        return command(*words[1:])
    line = shown.text if words[0] not in ("pytest",) else shlex.join([sys.executable, "-m", *words])
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr)
    return done.returncode


def by_document() -> dict[str, list[Command]]:
    """Per document the commands to be run, each in the first document that shows it unless it is needed again."""
    files: dict[str, list[Command]] = {}
    seen = set()
    for shown in commands():
        fate = COMMANDS.get(shown.text)
        if isinstance(fate, Run) and (fate.again or shown.text not in seen):
            files.setdefault(shown.place.partition(":")[0], []).append(shown)
            seen.add(shown.text)
    return files


RUN_HERE = by_document()
LONG = {f"docs/{name}.md" for name in ("adapter_tutorial", "adding", "conforms", "expectations", "reading_a_failure")}


@pytest.mark.parametrize("document", [
    pytest.param(name, marks=pytest.mark.nightly("the tutorial and docs/commands.md run by default") if name in LONG
                 else ()) for name in RUN_HERE])
def test_commands_run(document: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """In reading order, with the exit code that is stated, printing what the document shows of it, but for figures."""
    for shown in RUN_HERE[document]:
        fate = COMMANDS[shown.text]
        assert isinstance(fate, Run)
        capfd.readouterr()
        assert execute(shown, fate) == fate.exit_code, f"{shown.place}: {capfd.readouterr()}"
        printed = figures_left_out(capfd.readouterr().out)
        for part in filter(None, map(str.strip, figures_left_out(shown.output).split("..."))):
            assert part in printed, f"{shown.place}: {part!r} is not in {printed!r}"
            printed = printed.partition(part)[2]
