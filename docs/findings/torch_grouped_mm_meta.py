"""torch: grouped_mm runs in fp32 and fp16 but not on meta tensors, nor compiled. 0: seen, 1: not, 2: cannot run."""

import logging
import sys

try:
    import torch
    from torch.nn.functional import grouped_mm
except ImportError as error:
    print(f"CANNOT RUN: {error}")
    sys.exit(2)

ROWS, INNER, OUTER = 64, 32, 48


def tried(call):
    try:
        call()
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if "Expected inputs" in line]
        said = lines[0][lines[0].index("Expected inputs"):] if lines else str(error).strip().splitlines()[0]
        return f"{type(error).__name__}: {said[:75]}"
    return "ok"


def main() -> int:
    print(f"torch {torch.__version__}, CPU")
    logging.disable(logging.ERROR)  # torch logs the failed trace as well
    torch.manual_seed(0)
    a, b = torch.randn(ROWS, INNER), torch.randn(4, INNER, OUTER)
    offs = torch.tensor([10, 10, 37, ROWS], dtype=torch.int32)
    want = torch.cat([a[s:e] @ b[g] for g, (s, e) in enumerate([(0, 10), (10, 10), (10, 37), (37, ROWS)])])
    found = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x, weight = a.to(dtype), b.to(dtype)
        error = float((grouped_mm(x, weight, offs=offs).float() - want).abs().max() / want.abs().max())
        compiled = torch.compile(lambda x, weight: grouped_mm(x, weight, offs=offs), backend="eager")
        meta = tried(lambda x=x, weight=weight: grouped_mm(x.to("meta"), weight.to("meta"), offs=offs.to("meta")))
        traced = tried(lambda x=x, weight=weight, compiled=compiled: compiled(x, weight))
        name = str(dtype)[6:]
        print(f"{name:8s} eager: error {error:.0e} of the largest output")
        print(f"{name:8s} meta: {meta}")
        print(f"{name:8s} torch.compile(backend='eager'): {traced}")
        found[dtype] = error < 2e-2 and meta != "ok" and traced != "ok"
        torch._dynamo.reset()
    if found[torch.bfloat16]:
        raise RuntimeError("bf16 fails too: this script does not measure what it says")
    seen = found[torch.float32]
    print("SEEN" if seen else "NOT SEEN")
    return 0 if seen else 1


if __name__ == "__main__":
    sys.exit(main())
