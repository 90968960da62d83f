"""What the codes and scales of every scheme are. Imports no torch.

    value = second scale * scale[block] * (code - zero[block])          exactly, in real numbers

A block is a run of rows (output features) times a run of columns (input features); the last ones may be partial.
"""

from dataclasses import dataclass
from enum import StrEnum

from moe_ref.contract.case import Case
from moe_ref.contract.vocabulary import Schedule, Scheme


class Codes(StrEnum):
    """Numbers that a code stands for.

    `e4m3`: 8-bit floats without infinity (OCP FP8); `int8`: -128 to 127; `int4`: 0 to 15 minus a zero point, 8 where
    none is stored; `e2m1`: 4-bit floats 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives (OCP Microscaling 1.0).
    """

    E4M3 = "e4m3"
    INT8 = "int8"
    INT4 = "int4"
    E2M1 = "e2m1"

    @property
    def per_byte(self) -> int:
        """Codes in a byte: of two the column with the even number lies in the low half."""
        return 2 if self in (Codes.INT4, Codes.E2M1) else 1


class Scales(StrEnum):
    """Formats of scales; `e8m0` is a power of two by its exponent plus 127, `half` fp16 or bf16."""

    FP32 = "fp32"
    HALF = "half"
    E8M0 = "e8m0"
    E4M3 = "e4m3"


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """A scheme's codes and scales.

    rows, columns: sizes of a block, None standing for all of them. zeros: each block has a zero point. order: each
    column has the number of its group (act-order, g_idx), in no order. second: one more scale, in fp32, of the whole
    matrix. input_scale: one fp32 scale of the expert's rows, fixed when the weights were made.
    """

    codes: Codes
    scales: Scales
    rows: int | None
    columns: int | None
    zeros: bool = False
    order: bool = False
    second: bool = False
    input_scale: bool = False

    def blocks(self, num_rows: int, num_columns: int, row_start: int = 0, column_start: int = 0) -> tuple[int, int]:
        """How many blocks a part has along both axes, when it begins so far inside its first block."""
        return (1 if self.rows is None else -(-(row_start + num_rows) // self.rows),
                1 if self.columns is None else -(-(column_start + num_columns) // self.columns))


def _groups(columns: int, **more: bool) -> Encoding:
    return Encoding(codes=Codes.INT4, scales=Scales.HALF, rows=1, columns=columns, **more)


ENCODINGS = {
    Scheme.FP8_TENSOR: Encoding(codes=Codes.E4M3, scales=Scales.FP32, rows=None, columns=None, input_scale=True),
    Scheme.FP8_ROW: Encoding(codes=Codes.E4M3, scales=Scales.FP32, rows=1, columns=None),
    Scheme.FP8_BLOCK: Encoding(codes=Codes.E4M3, scales=Scales.FP32, rows=128, columns=128),
    Scheme.INT8: Encoding(codes=Codes.INT8, scales=Scales.FP32, rows=1, columns=None),
    Scheme.GPTQ: _groups(128),
    Scheme.GPTQ_32: _groups(32),
    Scheme.GPTQ_ORDER: _groups(128, order=True),
    Scheme.GPTQ_ORDER_32: _groups(32, order=True),
    Scheme.AWQ: _groups(128, zeros=True),
    Scheme.AWQ_32: _groups(32, zeros=True),
    Scheme.MXFP4: Encoding(codes=Codes.E2M1, scales=Scales.E8M0, rows=1, columns=32),
    Scheme.MXFP8: Encoding(codes=Codes.E4M3, scales=Scales.E8M0, rows=1, columns=32),
    Scheme.NVFP4: Encoding(codes=Codes.E2M1, scales=Scales.E4M3, rows=1, columns=16, second=True),
}
"""Every scheme but plain. Sources: DeepSeek-V3 (arXiv 2412.19437, section 3.3) for 128 x 128 blocks; GPTQ (arXiv
2210.17323); AWQ (arXiv 2306.00978); OCP Microscaling 1.0 for mxfp4 and mxfp8; NVIDIA's description of NVFP4."""


def cuts_blocks(case: Case) -> bool:
    """Whether a tp rank's part of an encoded matrix begins inside a block, along either axis that is cut."""
    encoding, problem = ENCODINGS[case.problem.scheme], case.problem
    by_output = case.parallel.schedule is Schedule.GATHER
    inner = [cut for one in case.parallel.ranges(problem.spec.intermediate_size) for cut in one[:1]]
    outer = [cut for one in case.parallel.ranges(problem.spec.hidden_size) for cut in one[:1]] if by_output else []
    columns = None if encoding.order or by_output else encoding.columns
    return any(cut % size for cuts, size in ((inner, encoding.rows), (inner, columns), (outer, encoding.rows))
               if size is not None for cut in cuts)
