"""transformers: experts_implementation sonicmoe drops custom gates. 0: seen, 1: not seen, 2: cannot run here."""

import enum
import sys
import types

try:
    import torch
    import transformers
    from transformers.integrations import sonicmoe
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    sonicmoe.load_sonicmoe_kernel  # noqa: B018
except (ImportError, AttributeError) as error:
    print(f"CANNOT RUN: {error}")
    sys.exit(2)

TOKENS, TOP_K, HIDDEN, INTERMEDIATE, EXPERTS = 12, 2, 64, 32, 8
ActivationType = enum.Enum("ActivationType", ["SWIGLU", "GEGLU", "REGLU", "GELU", "RELU", "SILU"])


def make(**options):
    torch.manual_seed(0)
    config = transformers.GptOssConfig(hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_local_experts=EXPERTS,
                                       **options)
    experts = GptOssExperts(config)
    for parameter in experts.parameters():
        parameter.normal_()
    return experts


def same(left, right):
    return torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right


def main() -> int:
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    print("the CUDA kernel is replaced by a recorder of its arguments")
    received = []

    def kernel(hidden, *arguments, **options):
        received.append([hidden, *arguments, *options.items()])
        return torch.zeros_like(hidden), None

    sonicmoe.load_sonicmoe_kernel = lambda: types.SimpleNamespace(
        activation_type_enum=ActivationType, moe_general_routing_inputs=kernel)
    gates = []
    with torch.no_grad():
        blocks = [make(swiglu_alpha=1.702, swiglu_limit=7.0), make(swiglu_alpha=0.5, swiglu_limit=0.5)]
        x, weights = torch.randn(TOKENS, HIDDEN), torch.rand(TOKENS, TOP_K)
        ids = torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(TOKENS)])
        outputs = []
        for block in blocks:
            original = block._apply_gate
            block._apply_gate = lambda given, original=original: gates.append(1) or original(given)
            block.config._experts_implementation = "grouped_mm"
            outputs.append(block(x, ids, weights))
        calls_grouped = len(gates)
        for block in blocks:
            block.config._experts_implementation = "sonicmoe"
            block(x, ids, weights)
    left, right = received
    equal = len(left) == len(right) and all(same(a, b) for a, b in zip(left, right, strict=True))
    activation = [item[1] for item in left if isinstance(item, tuple) and item[0] == "activation_type"]
    apart = float((outputs[0] - outputs[1]).abs().max() / outputs[0].abs().max())
    print(f"two gpt_oss blocks, alpha 1.702 limit 7 and alpha 0.5 limit 0.5: grouped_mm outputs differ by {apart:.2f}")
    print(f"_apply_gate was called {calls_grouped} times by grouped_mm, {len(gates) - calls_grouped} times by sonicmoe")
    print(f"activation handed to the sonicmoe kernel: {activation[0].name if activation else 'none'}")
    print(f"all {len(left)} arguments that the kernel received are equal bit for bit: {equal}")
    seen = apart > 0.01 and len(gates) == calls_grouped and equal
    print("SEEN" if seen else "NOT SEEN")
    return 0 if seen else 1


if __name__ == "__main__":
    sys.exit(main())
