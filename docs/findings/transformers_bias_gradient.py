"""transformers: batched_mm and grouped_mm add bias gradients up in bf16. 0: seen, 1: not seen, 2: cannot run here."""

import copy
import sys

try:
    import torch
    import transformers
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
except ImportError as error:
    print(f"CANNOT RUN: {error}")
    sys.exit(2)

TOKENS, TOP_K, HIDDEN, INTER, EXPERTS = 512, 4, 64, 32, 8


def bias_gradient(experts, x, ids, weights, gradient, implementation):
    """The gradient of down_proj_bias, in fp64."""
    experts = copy.deepcopy(experts)
    experts.config._experts_implementation = implementation
    experts(x, ids, weights).backward(gradient)
    return experts.down_proj_bias.grad.double()


def main() -> int:
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    torch.manual_seed(0)
    config = transformers.GptOssConfig(hidden_size=HIDDEN, intermediate_size=INTER, num_local_experts=EXPERTS,
                                       num_experts_per_tok=TOP_K)
    experts = GptOssExperts(config).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(std=0.1)
    x = torch.randn(TOKENS, HIDDEN).bfloat16()
    ids = torch.rand(TOKENS, EXPERTS).topk(TOP_K).indices
    weights = torch.rand(TOKENS, TOP_K).bfloat16()
    # Of one sign, as where a loss pulls one way: what a sum loses once it is large is not made good again.
    gradient = torch.rand(TOKENS, HIDDEN).bfloat16()
    # Row by row, rounded as eager rounds it: what is added up is the same in all implementations.
    truth = torch.zeros(EXPERTS, HIDDEN, dtype=torch.float64)
    for slot in range(TOP_K):
        truth.index_add_(0, ids[:, slot], (gradient * weights[:, slot, None]).double())
    worst = {}
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        found = bias_gradient(experts, x, ids, weights, gradient, implementation)
        worst[implementation] = float(((found - truth).abs() / truth.abs()).max())
        print(f"{implementation:10s} largest relative error of down_proj_bias.grad {worst[implementation]:.1e}, "
              f"{worst[implementation] * 2 ** 9:.1f} times half a unit of bf16")
    if worst["eager"] > 2 ** -8:
        raise RuntimeError("eager is off too: this script does not measure what it says")
    seen = min(worst["batched_mm"], worst["grouped_mm"]) > 8 * worst["eager"]
    print("SEEN" if seen else "NOT SEEN")
    return 0 if seen else 1


if __name__ == "__main__":
    sys.exit(main())
