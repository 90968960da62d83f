"""torchtitan: the router's autocast to fp32 does nothing on a CPU. 0: seen, 1: not seen, 2: cannot run here."""

import sys
import warnings
from importlib.metadata import version

try:
    import torch
    from torchtitan.models.common.linear import Linear
    from torchtitan.models.common.moe import TokenChoiceTopKRouter

    VERSION = version("torchtitan")
except ImportError as error:
    print(f"CANNOT RUN: {error}")
    sys.exit(2)

TOKENS, HIDDEN, EXPERTS, TOP_K = 4096, 256, 64, 8


def main() -> int:
    print(f"torchtitan {VERSION}, torch {torch.__version__}, CPU")
    torch.manual_seed(0)
    config = TokenChoiceTopKRouter.Config(
        num_experts=EXPERTS, gate=Linear.Config(in_features=HIDDEN, out_features=EXPERTS), top_k=TOP_K,
        score_func="sigmoid")
    with torch.no_grad():
        router = config.build()
        router.gate.weight.normal_(std=HIDDEN ** -0.5)
        router.to(torch.bfloat16)
        x = torch.randn(1, TOKENS, HIDDEN).bfloat16()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            _, ids, scores = router(x)
        weight = router.gate.weight
        exact = torch.sigmoid(x.double() @ weight.double().T)
        fp32 = torch.sigmoid(x.float() @ weight.float().T)
    want = exact.topk(TOP_K).indices.sort().values
    flips = {name: int((got.sort().values != want).any(-1).sum())
             for name, got in (("the router", ids), ("a gate in fp32", fp32.topk(TOP_K).indices))}
    print(f"dtype of the scores: {str(scores.dtype)[6:]}; the source says that they are float32 from the autocast")
    for warning in {str(one.message).splitlines()[0] for one in caught}:
        print(f"warning: {warning}")
    print(f"largest error of a score: {(scores.double() - exact).abs().max():.1e}, of a gate in fp32: "
          f"{(fp32.double() - exact).abs().max():.1e}")
    for name, number in flips.items():
        print(f"tokens whose experts differ from those of fp64, {name}: {number} of {TOKENS}")
    seen = scores.dtype == torch.bfloat16
    print("SEEN" if seen else "NOT SEEN")
    return 0 if seen else 1


if __name__ == "__main__":
    sys.exit(main())
