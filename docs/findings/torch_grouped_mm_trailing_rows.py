"""torch: grouped_mm leaves rows past offs[-1] as it found the memory. 0: seen, 1: not seen, 2: cannot run here."""

import sys

try:
    import torch
    from torch.nn.functional import grouped_mm
except ImportError as error:
    print(f"CANNOT RUN: {error}")
    sys.exit(2)

ROWS, COMPUTED, INNER, OUTER, GROUPS = 256, 100, 32, 48, 4
MARK = 12345.0


def main() -> int:
    print(f"torch {torch.__version__}, CPU")
    torch.manual_seed(0)
    a, b = torch.randn(ROWS, INNER), torch.randn(GROUPS, INNER, OUTER)
    offs = torch.tensor([30, 30, 80, COMPUTED], dtype=torch.int32)
    found, right = 0, True
    for attempt in range(20):
        # A tensor of the output's size, freed: the allocator hands its memory to the next one.
        freed = torch.full((ROWS, OUTER), MARK + attempt)
        del freed
        out = grouped_mm(a, b, offs=offs)
        found += int((out[COMPUTED:] == MARK + attempt).all())
        start = 0
        for group, end in enumerate(offs.tolist()):
            # Only to say that the call worked: a wrong row would be off by whole units, fp32 sums of 32 by 1e-5.
            right &= torch.allclose(out[start:end], a[start:end] @ b[group], atol=1e-4)
            start = end
    print(f"rows below offs[-1] = {COMPUTED} are right: {right}")
    print(f"rows {COMPUTED} to {ROWS - 1} all held the contents of a freed tensor in {found} of 20 calls")
    backward = 0
    for attempt in range(20):
        x = a.clone().requires_grad_()
        gradient_out = torch.zeros(ROWS, OUTER)
        gradient_out[:COMPUTED] = 1.0
        out = grouped_mm(x, b, offs=offs)
        freed = torch.full((ROWS, INNER), MARK + attempt)
        del freed
        [gradient] = torch.autograd.grad(out, x, gradient_out)
        backward += int((gradient[COMPUTED:] != 0).any())
    print(f"the gradient of those rows of mat_a, whose incoming gradient is 0, was not 0 in {backward} of 20 calls")
    if not right:
        raise RuntimeError("rows below offs[-1] are wrong: this script does not measure what it says")
    # Which memory a call gets is the allocator's choice, so that either of the two may be without luck.
    seen = found > 0 or backward > 0
    print("SEEN" if seen else "NOT SEEN")
    return 0 if seen else 1


if __name__ == "__main__":
    sys.exit(main())
