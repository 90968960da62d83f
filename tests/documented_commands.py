"""What becomes of each command in the documents: run, run shortened, run elsewhere, or not to be run here.

A command that is new in a document gets its line here; keys are commands as `tests.documents.commands` gives them.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Run:
    """Executed by the test, in the order of its document; the options replace or join those that are written.

    again: in every document that shows it, not in the first alone, as commands after it need what it leaves.
    """

    options: dict[str, str] = field(default_factory=dict)
    exit_code: int = 0
    again: bool = False


@dataclass(frozen=True)
class Elsewhere:
    """Executed by another part of the project: a file that must hold this text."""

    file: str
    text: str


@dataclass(frozen=True)
class NotHere:
    """Needs what a test run does not have."""

    reason: str


CASE = "v1-T33.H96.I160.E8.K2-bf16-norm-tp2"
PLACEHOLDERS = {"RUN": "runs/mine", "CASE": CASE, "ID": CASE, "MODEL": "mixtral.8x7b", "IMPL": "mypkg.layer",
                "TIER": "smoke", "HOST:29400": "localhost:29400", "FOLDER": "runs/folder", "DIR": "runs/folder"}
"""Words that stand for a reader's own."""

ONE_CASE = {"--case": CASE}
SMALL = {"--k": "64,256", "--m": "16", "--n": "16"}
LANES = {"--lanes": "~/moe-ref/ci/lanes.yaml"}
ONE_TIMING = {"--device": "cpu", "--tokens": "1", "--operations": "experts", "--seconds": "0",
              "--against": "torch:loop"}
INSTALLS = NotHere("an installation; ci/environment does the same in every run of CI")
LONG = NotHere("hours of a CPU, or a large download")
NO_GPU = NotHere("times of a GPU")

COMMANDS: dict[str, Run | Elsewhere | NotHere] = {
    # README
    "bash ci/verify": Elsewhere(".ci/run", "bash ci/verify quick"),
    "bash ci/test": Elsewhere("ci/lanes.yaml", "command: bash ci/test"),
    "pip install -e .": INSTALLS,
    "pip install -e '.[triton,reports]'": INSTALLS,
    "pip install -e '.[crosscheck]'": INSTALLS,
    # docs/adding.md
    "moe-ref show v1-T9.H64.I48.E4.K2-bf16-norm-tp2": Run(),
    "moe-ref replay v1-T9.H64.I48.E4.K2-bf16-norm-tp2 --impl moe_fast": Run(),
    "moe-ref verify moe_fast --tier quick": Elsewhere("ci/verify", "moe_ref verify moe_fast --tier"),
    "moe-ref show mixtral.8x7b --tp 8": Run(),
    "python -m tests.third_party.decoders.table":
        Elsewhere("tests/test_third_party_decoders.py", "from tests.third_party.decoders.compare import agreement"),
    "python -m tests.third_party.table mixtral": Elsewhere("tests/test_third_party.py", "from tests.third_party"),
    # docs/tutorial.md
    "pip install -e '.[triton,reports,dev]'": INSTALLS,
    "moe-ref list": Run(),
    f"moe-ref show {CASE}": Run(),
    "mkdir -p mypkg": Run(),
    "sed -n '/^# mypkg.layer.py$/,/^```$/p' ~/moe-ref/docs/plugging_in.md | sed '$d' > mypkg/layer.py": Run(),
    "moe-ref verify mypkg.layer --record runs/layer": Run({"--shard": "6/6"}),
    "sed '/groups.tp.all_reduce/d' mypkg/layer.py > mypkg/forgets.py": Run(),
    f"moe-ref verify mypkg.forgets --case {CASE}": Run(exit_code=1),
    f"moe-ref replay {CASE} --impl mypkg.layer": Run(),
    "moe-ref report runs/layer": Run(),
    "moe-ref accept runs/layer": Run(),
    "moe-ref report runs/layer --baseline ci/baselines": Run(),
    "pytest test_matrix.py --moe-impl mypkg.layer --moe-tier smoke":
        Elsewhere("tests/test_pytest_plugin.py", '"--moe-impl", "moe_fast"'),
    # docs/adapter_tutorial.md
    "pip install -e '.[reports,dev]'": INSTALLS,
    "moe-ref setup mypkg.adapter:ADAPTER": Run(),
    """sed 's/"interleaved"/"merged"/' mypkg/adapter.py > mypkg/halves.py""": Run(),
    "moe-ref setup mypkg.halves:ADAPTER": Run(exit_code=1),
    "moe-ref verify mypkg.adapter:ADAPTER --tier conformance --record runs/fused": Run({"--shard": "1/12"}),
    "moe-ref report runs/fused": Run(),
    "sed 's/Stage.GATE_UP, //' mypkg/adapter.py > mypkg/unrounded.py": Run(),
    "moe-ref verify mypkg.unrounded:ADAPTER --case v1-T33.H128.I256.E8.K2-bf16-norm": Run(exit_code=1),
    "pytest test_fused.py --moe-impl mypkg.adapter:ADAPTER --moe-tier conformance":
        Elsewhere("tests/test_pytest_plugin.py", '"--moe-impl", "moe_fast"'),
    # docs/conforms.md
    "pytest test_experts.py": Run(),
    "sed 's/gate_RI, up_RI =/up_RI, gate_RI =/' mypkg/experts.py > mypkg/swapped.py": Run(),
    "sed 's/mypkg.experts/mypkg.swapped/' test_experts.py > test_swapped.py": Run(),
    "pytest test_swapped.py": Run(exit_code=1),
    "sed 's/len(w13_EFH)/len(w13_EFH[:7])/' mypkg/experts.py > mypkg/seven.py": Run(),
    "sed 's/mypkg.experts/mypkg.seven/' test_experts.py > test_seven.py": Run(),
    "pytest test_seven.py": Run(exit_code=1),
    "pytest test_options.py --moe-device cuda --moe-record runs/tests":
        Elsewhere("tests/test_conforms.py", '"--moe-device", "cpu", "--moe-record", "record"'),
    # docs/reading_a_failure.md
    **{f"moe-ref verify mypkg.{name} --case {CASE}": Run(exit_code=1)
       for name in ("swaps", "rounded", "dirty", "crashes", "twice")},
    f"moe-ref verify mypkg.hangs --case {CASE} --time-limit 3": Run(exit_code=1),
    "moe-ref verify mypkg.varies --case v1-T17.H80.I72.E5.K3-bf16-tp2": Run(exit_code=1),
    f"moe-ref verify mypkg.layer --case {CASE}-gather": Run(exit_code=4),
    f"moe-ref verify moe_fast --case {CASE} --ranks nccl": Run(exit_code=4),
    # docs/expectations.md
    f"moe-ref verify mypkg.swaps --case {CASE} --expect expectations.yaml": Run(),
    f"moe-ref verify mypkg.crashes --case {CASE} --expect crashes.yaml": Run(exit_code=1),
    "pytest test_matrix.py --moe-impl mypkg.swaps --moe-tier smoke --moe-expect expectations.yaml":
        Elsewhere("tests/test_expected_runs.py", '"--moe-impl", WRONG, "--moe-expect", path'),
    # docs/commands.md
    "moe-ref verify mypkg.swaps --expect expectations.yaml": Run(ONE_CASE),
    "moe-ref list --tier quick": Run(),
    "moe-ref list --models": Run(),
    "moe-ref show deepseek.v3 --tp 8": Run(),
    "moe-ref show v1-mixtral.8x7b.T32-bf16-tp8": Run(),
    "moe-ref setup moe_fast": Run(),
    "moe-ref verify moe_fast --tier smoke": Elsewhere("ci/oldest", "-m moe_ref verify moe_fast --tier smoke"),
    "moe-ref verify moe_ref.simulated.subjects:pairwise": Run(ONE_CASE),
    "moe-ref verify mypkg.layer --tp 1,2,4,8": Run({"--shard": "1/20"}),
    "moe-ref verify mypkg.layer --tier quick --record RUN": Run({"--shard": "1/690", "--record": "runs/quick"}),
    "torchrun --nproc-per-node 4 -m moe_ref verify mypkg.layer --tier ranks --ranks torchrun":
        Elsewhere("tests/test_torchrun.py", '"torch.distributed.run"'),
    "pytest --moe-impl mypkg.layer --moe-tier quick": Elsewhere("tests/test_pytest_plugin.py", '"--moe-impl"'),
    "moe-ref replay CASE --impl mypkg.layer": Run(),
    "moe-ref report RUN --baseline ci/baselines": Run(),
    "moe-ref accept RUN --dry-run": Run(),
    "moe-ref accept RUN": Run(),
    "moe-ref lanes list": Run(LANES),
    "moe-ref adapters list": Run(),
    "moe-ref adapters run --record CONFORMANCE": Elsewhere("tests/test_conformance.py", '"adapters", "run"'),
    "moe-ref adapters table CONFORMANCE": Elsewhere("tests/test_conformance.py", '"adapters", "table"'),
    "moe-ref lanes select --event pull_request --changed moe_fast/layer.py": Run(LANES),
    "moe-ref bench moe_fast": Run(ONE_TIMING),
    "moe-ref bench moe_fast --roofline H100": Elsewhere("tests/test_roofline.py", '"moe_fast", "--roofline", "H100"'),
    "moe-ref tune --model mixtral.8x7b --tp 8": Elsewhere("tests/test_tune.py", '["tune", *arguments]'),
    "moe-ref score": Elsewhere("ci/lanes.yaml", "command: bash ci/score --record"),
    "moe-ref fingerprint": Run(),
    "moe-ref compile": Elsewhere("ci/lanes.yaml", "command: bash ci/compile"),
    "moe-ref diverge mypkg.gemm:grouped --ask tf32": Run(SMALL),
    "moe-ref diverge mypkg.gemm:grouped --ask low-precision": Run(SMALL),
    "moe-ref diverge mypkg.gemm:grouped torch:loop --k 14336": Run({"--m": "16", "--n": "16"}),
    # docs/reports.md
    "moe-ref report RUN": Run(),
    "moe-ref report RUN --baseline ci/baselines --out pages": Run(),
    "moe-ref report RUN --json": Run(),
    "moe-ref history add RUN": Run(again=True),
    "moe-ref history show": Run({"--stage": "down"}),
    'moe-ref history show --class "bf16 tp4" --stage down': Run(),
    "moe-ref report RUN --history history.db": Run(),
    # docs/bench.md
    "moe-ref bench mypkg.layer moe_fast --model deepseek.v3 --tp 8 --tokens 1,64,4096": NO_GPU,
    "moe-ref bench moe_fast --preset mixtral-founding --against torch:grouped,peers --record RUN --plot times.svg":
        NO_GPU,
    "moe-ref bench --read RUN --plot times.svg": Elsewhere("tests/test_bench_run.py", '["--read", str(folder)'),
    "moe-ref bench moe_fast --device cpu": Elsewhere("tests/test_bench_run.py", '"--device", "cpu"'),
    "moe-ref bench moe_fast --roofline H100 --no-kernels --model mixtral.8x7b --tp 4,8": LONG,
    "moe-ref bench moe_fast --roofline H100 --no-kernels --model deepseek.v3 --model qwen3.30b.a3b --tp 8": LONG,
    "moe-ref tune --model mixtral.8x7b --model qwen3.30b.a3b --tp 4,8 --tokens 1:4096 --record runs/tune.jsonl": NO_GPU,
    # docs/compile.md
    "moe-ref compile --arch sm_90 --case v1-mixtral.8x7b.T64-bf16-tp8-bwd --each":
        NotHere("minutes of compiling; the gate of the lane `compile` compiles cases of its own"),
    "moe-ref compile --record DIR": Elsewhere("ci/lanes.yaml", "bash ci/compile --record {record}"),
    "moe-ref compile --models": Elsewhere("ci/lanes.yaml", "command: bash ci/compile --models"),
    "moe-ref compile --tiles": LONG,
    "moe-ref compile --accept": NotHere("rewrites the accepted table"),
    # docs/diverge.md
    "moe-ref diverge moe_fast:tf32 --k 256,2048 --m 32 --n 32 --data unit --dtype fp32 --ask tf32": Run(),
    "moe-ref diverge torch:loop --k 64,256,1024,2048 --m 32 --n 32 --ask tf32": Run(),
    "moe-ref diverge model:sm90-fp16:fp16 --k 64,256,1024,2048 --m 32 --n 32 --ask low-precision": Run(),
    "moe-ref diverge torch:loop --k 64,256,1024,2048 --m 32 --n 32 --ask low-precision": Run(),
    "moe-ref diverge moe_fast:tf32 torch:loop --k 14336 --m 32 --n 32 --data unit": Run(),
    # docs/parallel.md
    "torchrun --standalone --nproc-per-node 4 -m moe_ref verify mypkg.layer --tier ranks --ranks torchrun --record RUN":
        Elsewhere("tests/test_torchrun.py", '"torch.distributed.run"'),
    "torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29400 "
    "-m moe_ref verify mypkg.layer --tier ranks --ranks torchrun --record RUN": NotHere("two hosts"),
    "bash tests/two_hosts.sh torchrun --nnodes 2 --nproc-per-node 2 --rdzv-backend c10d --rdzv-endpoint first:29400 "
    "-m moe_ref verify moe_fast --ranks torchrun --device cpu --record RUN --case v1-T5.H32.I48.E4.K2-bf16-norm-tp4 "
    "--case v1-T5.H32.I48.E4.K2-fp32-norm-tp2-ep2-reducescatter-tokensboth":
        Elsewhere("tests/test_torchrun.py", "def test_two_hosts"),
    # docs/score.md
    "moe-ref score --record runs/score": Elsewhere("ci/score", 'moe_ref score --record "runs/score-'),
    "moe-ref score --only 'F*' --verbose": Elsewhere("ci/lanes.yaml", "command: bash ci/score --only"),
    "moe-ref score --full": LONG,
    "moe-ref score --only F02.residual-on-every-rank --seed /tmp/f02":
        Run({"--seed": "copy", "--catalogue": "~/moe-ref/tests/catalogue"}),
}
