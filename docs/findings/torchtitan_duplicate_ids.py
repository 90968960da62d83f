"""torchtitan: an expert that a token names twice is counted once. 0: seen, 1: not seen, 2: cannot run here."""

import sys
from importlib.metadata import version

try:
    import torch
    from torchtitan.models.common.linear import Linear
    from torchtitan.models.common.moe import GroupedExperts, MoE, RoutedExperts, TokenChoiceTopKRouter
    from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher

    VERSION = version("torchtitan")
except ImportError as error:
    print(f"CANNOT RUN: {error}")
    sys.exit(2)

TOKENS, HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 32, 64, 32, 8, 2


def main() -> int:
    print(f"torchtitan {VERSION}, torch {torch.__version__}, CPU, no expert parallelism")
    torch.manual_seed(0)
    config = MoE.Config(
        num_experts=EXPERTS, load_balance_coeff=1e-3,
        router=TokenChoiceTopKRouter.Config(
            num_experts=EXPERTS, gate=Linear.Config(in_features=HIDDEN, out_features=EXPERTS), top_k=TOP_K),
        routed_experts=RoutedExperts.Config(
            inner_experts=GroupedExperts.Config(dim=HIDDEN, hidden_dim=INTERMEDIATE, num_experts=EXPERTS),
            token_dispatcher=LocalTokenDispatcher.Config(num_experts=EXPERTS, top_k=TOP_K)))
    with torch.no_grad():
        layer = config.build()
        for parameter in layer.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
        layer.expert_bias_E.zero_()
        layer.tokens_per_expert_E.zero_()
        layer.to(torch.bfloat16)
        x = torch.randn(1, TOKENS, HIDDEN).bfloat16()
        ids = torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(TOKENS)])[None]
        scores = torch.rand(1, TOKENS, TOP_K)
        twice = ids.clone()
        twice[0, ::4, 1] = twice[0, ::4, 0]  # tokens 0, 4, 8 ... name one expert in both slots
        experts = layer.routed_experts.inner_experts

        def reference(given):
            y = torch.zeros(TOKENS, HIDDEN, dtype=torch.float64)
            for token in range(TOKENS):
                for expert, score in zip(given[0, token].tolist(), scores[0, token].double(), strict=True):
                    row = x[0, token].double()
                    act = (torch.nn.functional.silu(experts.w1_EFD[expert].double() @ row)
                           * (experts.w3_EFD[expert].double() @ row))
                    y[token] += score * (experts.w2_EDF[expert].double() @ act)
            return y

        wrong = {}
        for name, given in (("distinct", ids), ("with repeats", twice)):
            counted = []
            layer.router.forward = lambda x, bias=None, given=given: (
                scores, given, torch.zeros(1, TOKENS, EXPERTS))
            hook = layer.routed_experts.register_forward_pre_hook(
                lambda module, arguments, counted=counted: counted.append(int(arguments[3].sum())))
            got = layer(x)[0].double()
            hook.remove()
            want = reference(given)
            off = ~((got - want).abs() <= 0.03 * want.abs().max()).all(1)  # bf16; NaN is off
            wrong[name] = {token for token in range(TOKENS) if off[token]}
            repeats = int((given[0, :, 0] == given[0, :, 1]).sum())
            print(f"{name:12s}: {repeats} tokens name an expert twice; rows counted {counted[0]} of {TOKENS * TOP_K}; "
                  f"{len(wrong[name])} of {TOKENS} tokens wrong")
    if wrong["distinct"]:
        raise RuntimeError("distinct ids are wrong too: this script does not measure what it says")
    seen = bool(wrong["with repeats"] - set(range(0, TOKENS, 4)))
    print("SEEN" if seen else "NOT SEEN")
    return 0 if seen else 1


if __name__ == "__main__":
    sys.exit(main())
