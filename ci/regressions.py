"""Are injected regressions called by their names? Four are put in, each is run and reported as a user would.

    python ci/regressions.py [--keep FOLDER]

A tile that drops the tail of K, a constant of tolerances.yaml that is looser, a degree of tensor parallelism that is no
longer run, a layer that takes twice as long. Prints what the summary says first of each; about a minute on two cores.
The last one needs a machine with little else to do: of times whose quartiles overlap nothing is said.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parents[1]
CASES = ("--case", "v1-T17.H80.I72.E5.K3-bf16-norm", "--case", "v1-T8.H64.I64.E8.K2-fp32-norm-empty")
BENCH = ("--model", "olmoe.1b.7b.E4", "--tp", "16", "--tokens", "1024", "--operations", "experts", "--against",
         "torch:grouped", "--device", "cpu", "--no-kernels")
LAYER = """from moe_ref.bench.torch_layers import grouped

CAPABILITIES = grouped.CAPABILITIES


def moe(*arguments, **options):
    for _ in range({times}):
        result = grouped.moe(*arguments, **options)
    return result
"""


def moe_ref(folder: Path, *arguments: str, expected: Sequence[int] = (0,)) -> str:
    """What `moe-ref ARGUMENTS` prints, with the packages in `folder` before those of the checkout."""
    environment = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "moe_ref", *arguments], cwd=folder, env=environment, text=True,
                          capture_output=True, check=False)
    if done.returncode not in expected:
        raise click.ClickException(f"moe-ref {' '.join(arguments)}: exit {done.returncode}, but should be one of "
                                   f"{list(expected)}\n{done.stdout}{done.stderr}")
    return done.stdout


def verified(folder: Path, implementation: str, *options: str, expected: Sequence[int] = (0,)) -> Path:
    """The record of a run in a folder."""
    folder.mkdir(exist_ok=True)
    moe_ref(folder, "verify", implementation, *CASES, *options, "--record", str(folder / "run"), expected=expected)
    return folder / "run"


def named(title: str, text: str, *patterns: str) -> bool:
    """Print what was said, and whether all that should be in it is."""
    missing = [pattern for pattern in patterns if not re.search(pattern, text)]
    click.echo(f"== {title}: {'not named: ' + ', '.join(missing) if missing else 'named'}")
    click.echo("\n".join(line for line in text.splitlines() if line.startswith(("FAIL", "PASS", "first")) or "slower" in
                         line) + "\n")
    return not missing


def dropped_tail(folder: Path, accepted: Path) -> bool:
    """A step of the products of gate and up is lost where K is no multiple of the block."""
    copy = folder / "moe_fast"
    shutil.copytree(ROOT / "moe_fast", copy, ignore=shutil.ignore_patterns("__pycache__"))
    target = copy / "kernels/gate_up.py"
    right, wrong = "range(0, hidden_size, BLOCK_H)", "range(0, hidden_size // BLOCK_H * BLOCK_H, BLOCK_H)"
    assert target.read_text().count(right) == 1
    target.write_text(target.read_text().replace(right, wrong))
    run = verified(folder, "moe_fast", expected=(1,))
    said = moe_ref(folder, "report", str(run), "--baseline", str(accepted), expected=(1,))
    return named("a tile that drops the tail of K", said, "1 new failure", "starts in act",
                 r"last \d+ columns of K left out of gate and up")


def looser_constant(folder: Path, accepted: Path) -> bool:
    """The judge's own copy, with one number of its tolerances raised."""
    shutil.copytree(ROOT / "moe_ref", folder / "moe_ref", ignore=shutil.ignore_patterns("__pycache__"))
    text = (ROOT / "tolerances.yaml").read_text()
    assert text.count("{sigmas_factor: 3.0,") == 1
    (folder / "tolerances.yaml").write_text(text.replace("{sigmas_factor: 3.0,", "{sigmas_factor: 6.0,"))
    run = verified(folder, "moe_fast")
    said = moe_ref(folder, "report", str(run), "--baseline", str(accepted), expected=(1,))
    return named("a looser constant", said, r"bounds looser: checks\.stage\.sigmas_factor 3 -> 6",
                 r"\d+ of \d+ ratios fell")


def lost_degree(folder: Path) -> bool:
    """tp 1 and 2 were accepted, tp 1 is run."""
    before, now = folder / "before", folder / "now"
    accepted = before / "accepted.json"
    run = verified(before, "moe_fast", "--tp", "1,2")
    moe_ref(before, "accept", str(run), "--baseline", str(accepted))
    run = verified(now, "moe_fast", "--tp", "1")
    said = moe_ref(now, "report", str(run), "--baseline", str(accepted), expected=(1,))
    return named("a degree that is no longer run", said, r"coverage -2 \(all 2 with tp 2\)",
                 "nothing failed, but 2 cases of the baseline did not run: all 2 with tp 2")


def twice_as_slow(folder: Path) -> bool:
    """A layer that computes everything twice, timed beside torch as the one that was accepted was."""
    accepted = folder / "speed.json"
    for times in (1, 2):
        (folder / "some_layer.py").write_text(LAYER.format(times=times))
        record = folder / f"bench-{times}"
        moe_ref(folder, "bench", "some_layer", *BENCH, "--record", str(record))
        said = moe_ref(folder, "accept", str(record), "--baseline", str(accepted), *["--dry-run"] * (times == 2))
    return named("a layer that is twice as slow", said, r"\d\.\dx slower beside torch:grouped: experts of olmoe",
                 "NO EVIDENCE: times of a CPU")


@click.command()
@click.option("--keep", type=click.Path(path_type=Path, file_okay=False), help="Keep records and pages here.")
def main(keep: Path | None) -> None:
    """Exit code 1 where a regression is not called by its name."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = (keep or Path(temporary)).resolve()
        folders = [folder / name for name in ("right", "tail", "looser", "degree", "slow")]
        for one in folders:
            one.mkdir(parents=True)
        right, tail, looser, degree, slow = folders
        run = verified(right, "moe_fast")
        accepted = right / "accepted.json"
        moe_ref(right, "accept", str(run), "--baseline", str(accepted))
        done = [dropped_tail(tail, accepted), looser_constant(looser, accepted), lost_degree(degree),
                twice_as_slow(slow)]
    click.echo(f"{sum(done)} of {len(done)} injected regressions are called by their names")
    sys.exit(not all(done))


if __name__ == "__main__":
    main()
