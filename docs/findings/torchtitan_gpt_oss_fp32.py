"""torchtitan: gpt_oss experts raise on fp32 tokens, other experts do not. 0: seen, 1: not seen, 2: cannot run here."""

import sys
from importlib.metadata import version

try:
    import torch
    from torchtitan.models.common.moe import GroupedExperts, RoutedExperts
    from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher
    from torchtitan.models.gpt_oss.moe import GptOssGroupedExperts

    VERSION = version("torchtitan")
except ImportError as error:
    print(f"CANNOT RUN: {error}")
    sys.exit(2)

TOKENS, HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 16, 64, 32, 8, 2


def outcome(experts_class, dtype):
    torch.manual_seed(0)
    config = RoutedExperts.Config(
        inner_experts=experts_class.Config(dim=HIDDEN, hidden_dim=INTERMEDIATE, num_experts=EXPERTS),
        token_dispatcher=LocalTokenDispatcher.Config(num_experts=EXPERTS, top_k=TOP_K))
    experts = config.build().to(dtype)
    for parameter in experts.parameters():
        parameter.normal_(std=0.1)
    x = torch.randn(1, TOKENS, HIDDEN).to(dtype)
    ids = torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(TOKENS)])[None]
    counts = torch.bincount(ids.flatten(), minlength=EXPERTS)
    try:
        return f"runs, output {str(experts(x, torch.rand(1, TOKENS, TOP_K), ids, counts).dtype)[6:]}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"


def main() -> int:
    print(f"torchtitan {VERSION}, torch {torch.__version__}, CPU, no expert parallelism")
    found = {}
    with torch.no_grad():
        for experts_class in (GroupedExperts, GptOssGroupedExperts):
            for dtype in (torch.bfloat16, torch.float32):
                found[experts_class, dtype] = said = outcome(experts_class, dtype)
                print(f"{experts_class.__name__:20s} tokens {str(dtype)[6:]:8s}: {said}")
    failing = [key for key, said in found.items() if not said.startswith("runs")]
    if (GroupedExperts, torch.float32) in failing or (GptOssGroupedExperts, torch.bfloat16) in failing:
        raise RuntimeError("what should run raises too: this script does not measure what it says")
    print("SEEN" if failing else "NOT SEEN")
    return 0 if failing else 1


if __name__ == "__main__":
    sys.exit(main())
