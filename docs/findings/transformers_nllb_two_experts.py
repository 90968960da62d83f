"""transformers: the nllb_moe block runs experts 0 and 1 only. Exit code 0: seen, 1: not seen, 2: cannot run here."""

import sys

try:
    import torch
    import transformers
    from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeSparseMLP
except ImportError as error:
    print(f"CANNOT RUN: {error}")
    sys.exit(2)

TOKENS, HIDDEN, EXPERTS = 40, 32, 8


def main() -> int:
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    config = transformers.NllbMoeConfig(d_model=HIDDEN, num_experts=EXPERTS, expert_capacity=TOKENS,
                                        moe_token_dropout=0.0)
    torch.manual_seed(0)
    with torch.no_grad():
        block = NllbMoeSparseMLP(config, 16).eval().double()
        block.router.dtype = torch.float64
        for parameter in block.parameters():
            parameter.normal_(std=0.2)
        ran = set()
        for name, expert in block.experts.items():
            if name.startswith("expert_"):
                expert.register_forward_hook(lambda module, given, output, name=name: ran.add(name))
        x = torch.randn(1, TOKENS, HIDDEN, dtype=torch.float64)
        got = block(x)[0]
        names = sorted(ran)
        first, weights, _ = block.router(x[0])
        outputs = torch.stack([block.experts[f"expert_{e}"](x[0]) for e in range(EXPERTS)], 1)  # token, expert, hidden
    want = (weights[..., None] * outputs).sum(1)
    top = (weights * first).sum(1, keepdim=True)       # the weight of each token's first expert
    second = weights.sum(1, keepdim=True) - top
    only_two = second * outputs[:, 0] + top * outputs[:, 1]
    scale = want.abs().max()
    error, explained = ((got - other).abs().max() / scale for other in (want, only_two))
    chosen = sorted(f"expert_{e}" for e in (weights > 0).any(0).nonzero().flatten().tolist())
    print(f"experts with a weight: {len(chosen)} of {EXPERTS}; experts that ran: {', '.join(names)}")
    print(f"fp64 error against sum of weight * expert(x), of the largest output: {error:.2e}")
    print(f"fp64 error against second weight * expert_0(x) + first weight * expert_1(x): {explained:.2e}")
    seen = len(chosen) > 2 and names == ["expert_0", "expert_1"] and error > 1e-3
    print("SEEN" if seen else "NOT SEEN")
    return 0 if seen else 1


if __name__ == "__main__":
    sys.exit(main())
