"""transformers: id -1 with weight 0 corrupts every token of grouped_mm experts. 0: seen, 1: not seen, 2: cannot run."""

import sys

try:
    import torch
    import transformers
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts
except ImportError as error:
    print(f"CANNOT RUN: {error}")
    sys.exit(2)

TOKENS, TOP_K, HIDDEN, INTERMEDIATE, EXPERTS = 12, 4, 64, 32, 16
ALLOWED = 1e-4


def reference(experts, x, ids, weights):
    """fp64, slot by slot; a slot of weight 0 adds nothing."""
    y = torch.zeros_like(x, dtype=torch.float64)
    for token in range(TOKENS):
        for expert, weight in zip(ids[token].tolist(), weights[token].double(), strict=True):
            if weight:
                gate, up = (experts.gate_up_proj[expert].double() @ x[token].double()).chunk(2)
                y[token] += weight * (experts.down_proj[expert].double() @ (torch.nn.functional.silu(gate) * up))
    return y


def wrong_rows(experts, implementation, x, ids, weights):
    """A list of the tokens that are off, or what was raised."""
    experts.config._experts_implementation = implementation
    try:
        got = experts(x, ids, weights)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    want = reference(experts, x, ids, weights)
    right = ((got - want).abs() <= ALLOWED * want.abs().max()).all(1)  # NaN is not right
    return (~right).nonzero().flatten().tolist()


def main() -> int:
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    config = transformers.MixtralConfig(hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_local_experts=EXPERTS)
    torch.manual_seed(0)
    with torch.no_grad():
        experts = MixtralExperts(config)
        for parameter in experts.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
        x, weights = torch.randn(TOKENS, HIDDEN), torch.rand(TOKENS, TOP_K)
        ids = torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(TOKENS)])
        found = {}
        for case, value in (("ids 0 to E-1", None), ("id -1, weight 0", -1), ("id E, weight 0", EXPERTS)):
            given, scores = ids.clone(), weights.clone()
            if value is not None:
                given[::4, 1], scores[::4, 1] = value, 0.0  # one slot of tokens 0, 4 and 8
            for implementation in ("eager", "batched_mm", "grouped_mm"):
                found[case, implementation] = rows = wrong_rows(experts, implementation, x, given, scores)
                said = rows if isinstance(rows, str) else f"{len(rows)} of {TOKENS} tokens wrong"
                print(f"{case:16s} {implementation:10s} {said}")
    rows = found["id -1, weight 0", "grouped_mm"]
    if found["ids 0 to E-1", "grouped_mm"] != [] or found["ids 0 to E-1", "eager"] != []:
        raise RuntimeError("usual ids are wrong too: this script does not measure what it says")
    seen = isinstance(rows, list) and len(set(rows) - {0, 4, 8}) > 0
    print("SEEN" if seen else "NOT SEEN")
    return 0 if seen else 1


if __name__ == "__main__":
    sys.exit(main())
