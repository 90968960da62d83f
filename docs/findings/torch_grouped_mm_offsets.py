"""torch: grouped_mm takes offsets that decrease or leave the operand. 0: seen, 1: not seen, 2: cannot run here."""

import sys

try:
    import torch
    from torch.nn.functional import grouped_mm
except ImportError as error:
    print(f"CANNOT RUN: {error}")
    sys.exit(2)

ROWS, INNER, OUTER = 64, 32, 48
CASES = {"right": [10, 10, 37, 64], "offs[-1] > rows": [10, 10, 37, 70], "two past the rows": [10, 10, 80, 96],
         "decreasing": [10, 5, 37, 64], "negative": [-8, 10, 37, 64]}


def main() -> int:
    print(f"torch {torch.__version__}, CPU, mat_a of {ROWS} rows")
    torch.manual_seed(0)
    a, b = torch.randn(ROWS, INNER), torch.randn(4, INNER, OUTER)
    want = torch.stack([a @ b[group] for group in range(4)])
    taken = []
    for dtype in (torch.float32, torch.bfloat16):
        for case, ends in CASES.items():
            try:
                out = grouped_mm(a.to(dtype), b.to(dtype), offs=torch.tensor(ends, dtype=torch.int32))
            except Exception as error:
                said = f"{type(error).__name__}: {str(error).splitlines()[0][:70]}"
                print(f"{str(dtype)[6:]:8s} {case:17s} {ends!s:16s} {said}")
                continue
            near = (out.float() - want).abs().amax(-1) < 0.2 * want.abs().amax(-1)  # group, row
            groups = [str(int(row.nonzero()[0])) if row.any() else "-" for row in near.T]
            rows = [(start, group) for start, group in enumerate(groups) if start == 0 or groups[start - 1] != group]
            said = ", ".join(f"{group} from row {start}" for start, group in rows)
            print(f"{str(dtype)[6:]:8s} {case:17s} {ends!s:16s} taken; group of a row: {said}")
            if case != "right":
                taken.append(case)
            elif said != "0 from row 0, 2 from row 10, 3 from row 37":
                raise RuntimeError("right offsets give something else: this script does not measure what it says")
    print(f"SEEN: {', '.join(dict.fromkeys(taken))}" if taken else "NOT SEEN")
    return 0 if taken else 1


if __name__ == "__main__":
    sys.exit(main())
