"""What the documents hold: fenced blocks, the shell commands in them, and commands within sentences."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")),
             *sorted((ROOT / "docs" / "findings").glob("*.md")), ROOT / "ci" / "README.md")
SHELL = ("", "bash", "sh", "console")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"`((?:moe-ref|python|bash|pytest|torchrun|pip|ci/[a-z]+) [^`]+)`")


@dataclass(frozen=True)
class Block:
    """A fenced block: where its first line stands, its language, its text."""

    file: Path
    line: int
    language: str
    text: str

    @property
    def place(self) -> str:
        """As docs/tutorial.md:12."""
        return f"{self.file.relative_to(ROOT)}:{self.line}"


@dataclass(frozen=True)
class Command:
    """A shell command without its comment, where it stands, and what the document shows as its output."""

    place: str
    text: str
    output: str = ""

    @property
    def words(self) -> list[str]:
        """As a shell splits them."""
        return shlex.split(self.text)


def blocks(*languages: str, files: tuple[Path, ...] = DOCUMENTS) -> list[Block]:
    """All fenced blocks in one of these languages, in reading order."""
    return [Block(file, text.count("\n", 0, found.start()) + 2, found[1], found[2])
            for file in files for text in [file.read_text()] for found in _FENCE.finditer(text)
            if found[1] in languages]


def commands(files: tuple[Path, ...] = DOCUMENTS) -> list[Command]:
    """Every command of shell blocks; where there are prompts, lines without one are output."""
    return [command for block in blocks(*SHELL, files=files) for command in _commands(block)]


def _commands(block: Block) -> list[Command]:
    prompts = re.search(r"^\$ ", block.text, re.MULTILINE)
    found: list[Command] = []
    pending = ""
    for number, line in enumerate(block.text.splitlines(), block.line):
        if pending:
            pending += line.strip()
        elif prompts and not line.startswith("$ "):
            if found:
                found[-1] = Command(found[-1].place, found[-1].text, found[-1].output + line + "\n")
            continue
        else:
            pending = line.removeprefix("$ ").strip()
            place = f"{block.file.relative_to(ROOT)}:{number}"
        if pending.endswith("\\"):
            pending = pending[:-1]
            continue
        if text := without_comment(pending):
            found.append(Command(place, text))
        pending = ""
    return found


def without_comment(line: str) -> str:
    """The line up to a # that begins a word outside quotes."""
    quote = ""
    for index, letter in enumerate(line):
        if letter in "'\"" and quote in ("", letter):
            quote = "" if quote else letter
        if letter == "#" and not quote and (index == 0 or line[index - 1].isspace()):
            return line[:index].rstrip()
    return line.rstrip()


def spans(files: tuple[Path, ...] = DOCUMENTS) -> list[Command]:
    """Commands within sentences and tables, `...` left out."""
    found = []
    for file in files:
        # Fenced blocks are blanked, so that lines keep their numbers.
        text = _FENCE.sub(lambda block: "\n" * block[0].count("\n"), file.read_text())
        found += [Command(f"{file.relative_to(ROOT)}:{text.count(chr(10), 0, one.start()) + 1}",
                          " ".join(one[1].replace("...", " ").split())) for one in _SPAN.finditer(text)]
    return found


def figures_left_out(text: str) -> str:
    """Words alone, one space apart: other machines and versions have other figures."""
    return " ".join(re.sub(r"[-+]?\d+(\.\d+)?(e[-+]?\d+)?|\b(inf|nan)\b", "#", text).split())


def layer() -> str:
    """mypkg/layer.py as docs/plugging_in.md shows it."""
    [block] = [one for one in blocks("python") if one.text.startswith("# mypkg/layer.py\n")]
    return block.text


def written_files() -> dict[str, str]:
    """Every file that the documents tell a reader to write: whole ones, and the layer with the changes of a diff."""
    files = {}
    for block in blocks("python", "yaml"):
        if named := re.match(r"# ((?:\w+/)*\w+\.(?:py|yaml))\n", block.text):
            # A day that a reader may copy is over one day.
            files[named[1]] = re.sub(r"expires: [-\d]+", "expires: 2999-12-31", block.text)
    for block in blocks("diff"):
        old, new = re.findall(r"^(?:---|\+\+\+) (\S+)$", block.text, re.MULTILINE)
        files[new] = _changed(files[old], block)
    return files


def _changed(text: str, block: Block) -> str:
    """The text with the lines after a - replaced by the lines after a +; what is replaced must be there once."""
    for hunk in re.findall(r"(?:^-(?!-- ).*\n)+(?:^\+(?!\+\+ ).*\n)*", block.text, re.MULTILINE):
        old = "".join(line[1:] + "\n" for line in hunk.splitlines() if line.startswith("-"))
        new = "".join(line[1:] + "\n" for line in hunk.splitlines() if line.startswith("+"))
        assert text.count(old) == 1, f"{block.place}: {old!r} is in the file {text.count(old)} times"
        text = text.replace(old, new)
    return text
