"""The words used by code, records, documents and messages; one enum each. Imports no torch."""

from enum import StrEnum


class Stage(StrEnum):
    """Observable stages of a layer, in the order in which data passes them.

    `shared` is the shared expert's output before the merge; the others follow the routed path. Each is
    judged from its own inputs; `output` is the result of the whole layer, judged from the layer's inputs.
    """

    LOGITS = "logits"
    IDS = "ids"
    WEIGHTS = "weights"
    PERMUTE = "permute"
    GATE_UP = "gate_up"
    ACT = "act"
    DOWN = "down"
    SHARED = "shared"
    MERGED = "merged"
    REDUCED = "reduced"
    OUTPUT = "output"


class Verdict(StrEnum):
    """What the judge says of one case."""

    PASS = "pass"
    MISMATCH = "mismatch"
    STRUCT = "struct"
    CRASH = "crash"
    HANG = "hang"
    NONDETERMINISTIC = "nondeterministic"
    KNOWN_FAILURE = "known_failure"
    UNEXPECTED_PASS = "unexpected_pass"
    UNSUPPORTED = "unsupported"
    NOT_RUN = "not_run"
    HARNESS_ERROR = "harness_error"


RED_VERDICTS = frozenset(
    {Verdict.MISMATCH, Verdict.STRUCT, Verdict.CRASH, Verdict.HANG, Verdict.NONDETERMINISTIC,
     Verdict.UNEXPECTED_PASS}
)
"""Verdicts that accuse the implementation."""

EXECUTED_VERDICTS = RED_VERDICTS | {Verdict.PASS, Verdict.KNOWN_FAILURE}
"""Verdicts of cases that really ran; only these count towards a tier's minimum."""


class Dtype(StrEnum):
    """Storage formats a case may name."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"


class Format(StrEnum):
    """Formats that numbers are stored or accumulated in; their properties stand in tolerances.yaml."""

    FP64 = "fp64"
    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"


class Pattern(StrEnum):
    """Where the routing of a case comes from.

    `uniform`: logits are x @ router^T. The others inject logits that force a load:
    `zipf` popularity halves with each doubling of the expert number; `onehot` one logit towers
    over the rest, weight near 1; `empty` the middle and last expert get no token;
    `allone` every token's first choice is the same expert; `ties` exact ties at the cut.
    """

    UNIFORM = "uniform"
    ZIPF = "zipf"
    ONE_HOT = "onehot"
    EMPTY = "empty"
    ALL_TO_ONE = "allone"
    TIES = "ties"


class Data(StrEnum):
    """Distribution of tokens and weights, always exactly on the storage grid.

    `unit`: symmetric, pre-activations with a standard deviation between 0.9 and 1.8; `outlier`: one
    channel of x in 64 is scaled by 64; `large`: gate and up weights are 8 times larger, so that
    pre-activations pass the clamps of released models; `nonfinite`: token 1 holds a NaN and token 2 an infinity,
    as far as there are so many tokens.
    """

    UNIT = "unit"
    OUTLIER = "outlier"
    LARGE = "large"
    NON_FINITE = "nonfinite"


class Storage(StrEnum):
    """The order in which weights lie in memory, behind the canonical view that an implementation is handed.

    `outin`: (out, in), gate rows before up rows, contiguous; `interleaved`: gate, up, gate, up;
    `inout`: (in, out), as gpt-oss and Llama 4 store it; `inoutinterleaved`: both. Strides say which; no number differs.
    """

    OUT_IN = "outin"
    IN_OUT = "inout"
    INTERLEAVED = "interleaved"
    IN_OUT_INTERLEAVED = "inoutinterleaved"


class Schedule(StrEnum):
    """How partial results of tensor-parallel ranks become the result."""

    ALL_REDUCE = "all_reduce"


class Ranks(StrEnum):
    """What the ranks of a run are: virtual (threads of one child) or processes."""

    LOCAL = "local"
    GLOO = "gloo"
    NCCL = "nccl"


class Direction(StrEnum):
    """Forward only, for now; the id keeps room for the backward pass."""

    FORWARD = "fwd"
