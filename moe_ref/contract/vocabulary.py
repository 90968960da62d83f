"""The words used by code, records, documents and messages; one enum each. Imports no torch."""

from enum import StrEnum


class Stage(StrEnum):
    """Observable stages of a layer, in the order in which data passes them.

    Where operands are rounded to 8 bits, *_scales and *_codes are those of the rows that the first and second product
    take: scales (R, blocks) in fp32, codes (R, H or I) as the numbers that they stand for, without their scales.
    `shared` is the shared expert's output before the merge; the others follow the routed path. Each is
    judged from its own inputs; `output` is the result of the whole layer, judged from the layer's inputs. grad_* are
    gradients of the layer's inputs and parameters, judged from the layer's inputs too, the nearest to the output first.
    """

    LOGITS = "logits"
    IDS = "ids"
    WEIGHTS = "weights"
    PERMUTE = "permute"
    PERMUTE_SCALES = "permute_scales"
    PERMUTE_CODES = "permute_codes"
    GATE_UP = "gate_up"
    ACT = "act"
    ACT_SCALES = "act_scales"
    ACT_CODES = "act_codes"
    DOWN = "down"
    SHARED = "shared"
    MERGED = "merged"
    REDUCED = "reduced"
    OUTPUT = "output"
    GRAD_RESIDUAL = "grad_residual"
    GRAD_OUTPUT_BIAS = "grad_output_bias"
    GRAD_W2_BIAS = "grad_w2_bias"
    GRAD_W2 = "grad_w2"
    GRAD_SHARED_W2_BIAS = "grad_shared_w2_bias"
    GRAD_SHARED_W2 = "grad_shared_w2"
    GRAD_W13_BIAS = "grad_w13_bias"
    GRAD_W13 = "grad_w13"
    GRAD_SHARED_W13_BIAS = "grad_shared_w13_bias"
    GRAD_SHARED_W13 = "grad_shared_w13"
    GRAD_SHARED_GATE = "grad_shared_gate"
    GRAD_WEIGHT_SCALE = "grad_weight_scale"
    GRAD_LOGITS = "grad_logits"
    GRAD_ROUTER_BIAS = "grad_router_bias"
    GRAD_ROUTER = "grad_router"
    GRAD_X = "grad_x"

    @property
    def is_gradient(self) -> bool:
        """Whether the backward pass returns it."""
        return self.startswith("grad_")


def gradient_stage(name: str) -> Stage:
    """The stage of the gradient of an argument or parameter of that name: that of w13_EGIH is grad_w13."""
    return Stage("grad_" + name.rpartition("_")[0])


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
    """Formats that numbers are stored, multiplied or accumulated in; their properties stand in tolerances.yaml."""

    FP64 = "fp64"
    FP32 = "fp32"
    TF32 = "tf32"
    FP16 = "fp16"
    BF16 = "bf16"
    E4M3 = "e4m3"
    E5M2 = "e5m2"


class Pattern(StrEnum):
    """Where the routing of a case comes from.

    `uniform`: logits are x @ router^T. The others inject logits that force a load:
    `zipf` popularity halves with each doubling of the expert number; `onehot` one logit towers
    over the rest, weight near 1; `empty` the middle and last expert get no token;
    `allone` every token's first choice is the same expert; `ties` exact ties at the cut; `near` ties but for
    multiples of 2^-13, of the selection bias where there is one, which 16 bits cannot tell apart. `holes`: in the
    injected routing of data exact every fourth slot names no expert: -1, one past the last, or a number of 33 bits.
    """

    UNIFORM = "uniform"
    ZIPF = "zipf"
    ONE_HOT = "onehot"
    EMPTY = "empty"
    ALL_TO_ONE = "allone"
    TIES = "ties"
    NEAR = "near"
    HOLES = "holes"


class Data(StrEnum):
    """Distribution of tokens and weights, always exactly on the storage grid.

    `unit`: symmetric, pre-activations with a standard deviation between 0.9 and 1.8; `outlier`: one
    channel of x in 64 is scaled by 64; `large`: gate and up weights are 8 times larger, so that
    pre-activations pass the clamps of released models; `nonfinite`: token 1 holds a NaN and token 2 an infinity,
    as far as there are so many tokens; `exact`: sums are exact in any order, so results must agree to the bit, and the
    routing is injected. Of encoded weights alone: `equal` gives all blocks one scale, which hides a scale read from
    another place; `extreme` has rows whose scales are tiny or huge, runs of code 0, and codes at their largest.
    """

    UNIT = "unit"
    OUTLIER = "outlier"
    LARGE = "large"
    NON_FINITE = "nonfinite"
    EXACT = "exact"
    EQUAL = "equal"
    EXTREME = "extreme"


class Scheme(StrEnum):
    """How the matrices of experts are encoded; contract/schemes.py has what each word means.

    `plain`: they are not. Numbers in names are sizes of groups where they are not the usual 128.
    """

    PLAIN = "plain"
    FP8_TENSOR = "fp8tensor"
    FP8_ROW = "fp8row"
    FP8_BLOCK = "fp8block"
    INT8 = "int8"
    GPTQ = "gptq"
    GPTQ_32 = "gptq32"
    GPTQ_ORDER = "gptqorder"
    GPTQ_ORDER_32 = "gptqorder32"
    AWQ = "awq"
    AWQ_32 = "awq32"
    MXFP4 = "mxfp4"
    MXFP8 = "mxfp8"
    NVFP4 = "nvfp4"


class Storage(StrEnum):
    """How tensors lie in memory, behind the canonical view that an implementation is handed.

    `outin`: (out, in), gate rows before up rows, contiguous; `interleaved`: gate, up, gate, up;
    `inout`: (in, out), as gpt-oss and Llama 4 store it; `inoutinterleaved`: both. Strides say which; no number differs.
    `padded`: every tensor, tokens and routing too, is a part of a larger one, from some way in, with NaN (integers:
    2^30) around it.
    """

    OUT_IN = "outin"
    IN_OUT = "inout"
    INTERLEAVED = "interleaved"
    IN_OUT_INTERLEAVED = "inoutinterleaved"
    PADDED = "padded"


class Schedule(StrEnum):
    """How partial results of tensor-parallel ranks become the result.

    `all_reduce`: one all-reduce after the weighted merge, T*H elements. `all_reduce_rows`: one all-reduce of every
    routed row before the merge, T*K*H. `reduce_scatter`: a reduce-scatter over tokens and an all-gather; tokens
    that are sharded over tp are gathered on the way in instead. `gather`: no row split: the tokens of rank 0 are
    broadcast, the activation is gathered, the down projection is cut by output, and its columns are gathered.
    """

    ALL_REDUCE = "all_reduce"
    ALL_REDUCE_ROWS = "all_reduce_rows"
    REDUCE_SCATTER = "reduce_scatter"
    GATHER = "gather"


class Tokens(StrEnum):
    """Which ranks hold a token when a layer is called: all of them, or one of those along the named axes."""

    REPLICATED = "replicated"
    SHARDED_TP = "sharded_tp"
    SHARDED_EP = "sharded_ep"
    SHARDED = "sharded"

    @property
    def over_tp(self) -> bool:
        """Whether each tensor-parallel rank has tokens of its own (sequence parallel)."""
        return self in (Tokens.SHARDED_TP, Tokens.SHARDED)

    @property
    def over_ep(self) -> bool:
        """Whether each expert-parallel rank has tokens of its own, so that rows travel to their experts and back."""
        return self in (Tokens.SHARDED_EP, Tokens.SHARDED)


class Hosting(StrEnum):
    """Which expert-parallel rank holds an expert: runs of neighbours, or one expert each in turn."""

    CONTIGUOUS = "contiguous"
    ROUND_ROBIN = "round_robin"


class SharedPlacement(StrEnum):
    """The shared expert: cut like the routed ones, or whole on every rank and added after the reduction."""

    SHARDED = "sharded"
    REPLICATED = "replicated"


class Ranks(StrEnum):
    """What the ranks of a run are: virtual (threads of one child), processes that a child forks, or those that torchrun
    started, on one host or many.
    """

    LOCAL = "local"
    GLOO = "gloo"
    NCCL = "nccl"
    TORCHRUN = "torchrun"

    def backend(self, device: str) -> "Ranks":
        """What an implementation declares to run on these ranks: torchrun's are gloo's on a CPU and NCCL's on CUDA."""
        if self is not Ranks.TORCHRUN:
            return self
        return Ranks.NCCL if device == "cuda" else Ranks.GLOO


class Direction(StrEnum):
    """The forward pass alone, or the gradients of everything that a layer is handed as well."""

    FORWARD = "fwd"
    BACKWARD = "bwd"
