"""transformers: deepseek_v2 does not read its option norm_topk_prob. 0: seen, 1: not seen, 2: cannot run here."""

import sys

try:
    import torch
    import transformers
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
except ImportError as error:
    print(f"CANNOT RUN: {error}")
    sys.exit(2)

TOKENS, TOP_K, HIDDEN, EXPERTS = 64, 4, 32, 16


def sums(router_class, config_class, norm_topk_prob, x):
    """The sum of each token's routing weights."""
    options = {"topk_method": "greedy"} if config_class is transformers.DeepseekV2Config else {"n_group": 1,
                                                                                               "topk_group": 1}
    config = config_class(hidden_size=HIDDEN, n_routed_experts=EXPERTS, num_experts_per_tok=TOP_K,
                          routed_scaling_factor=1.0, norm_topk_prob=norm_topk_prob, **options)
    router = router_class(config)
    torch.manual_seed(1)
    with torch.no_grad():
        router.weight.normal_(std=HIDDEN ** -0.5)
        return router(x)[1].sum(-1)


def main() -> int:
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    torch.manual_seed(0)
    x = torch.randn(TOKENS, HIDDEN)
    pairs = {"deepseek_v2": (DeepseekV2TopkRouter, transformers.DeepseekV2Config),
             "deepseek_v3": (DeepseekV3TopkRouter, transformers.DeepseekV3Config)}
    equal = {}
    for name, (router_class, config_class) in pairs.items():
        without, with_norm = (sums(router_class, config_class, value, x) for value in (False, True))
        equal[name] = torch.equal(without, with_norm)
        for value, found in ((False, without), (True, with_norm)):
            print(f"{name} norm_topk_prob={value!s:5s} sum of {TOP_K} weights: {found.min():.4f} to {found.max():.4f}")
    if equal["deepseek_v3"]:
        raise RuntimeError("deepseek_v3 ignores it too: this script does not measure what it says")
    seen = equal["deepseek_v2"]
    print("SEEN" if seen else "NOT SEEN")
    return 0 if seen else 1


if __name__ == "__main__":
    sys.exit(main())
