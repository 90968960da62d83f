"""Layers whose launches are compiled with every change: together they reach every kernel, every tile and every dtype.

Per-rank shapes of published models; a test compares what they launch with the kernels that there are.
"""

_MIXTRAL = "v1-mixtral.8x7b"

CASES = {
    # Mixtral on 8 ranks at every tile: 1, 16, 32, 64 rows per expert, and more.
    f"{_MIXTRAL}.T1-bf16-tp8-allreducerows": "decode of one token, rows reduced before the merge: what can be 1 is 1",
    f"{_MIXTRAL}.T64-bf16-tp8-bwd": "16 rows per expert",
    f"{_MIXTRAL}.T128-bf16-tp8-bwd": "32 rows per expert",
    f"{_MIXTRAL}.T256-bf16-tp8-bwd": "64 rows per expert",
    f"{_MIXTRAL}.T4096-bf16-tp8-bwd": "prefill",
    f"{_MIXTRAL}.T4096-bf16-tp8-gather-bwd": "prefill, both halves of the experts by themselves",
    "v1-deepseek.v3.T4096-bf16-tp8": "prefill; 256 experts, groups, a selection bias and a shared expert",
    "v1-T4096.H4096.I1792.E8.K2-fp16-norm-gelutanh": "fp16, gelu by tanh",
    f"{_MIXTRAL}.T4096-fp32-tp8-bwd": "fp32, on the plain units",
    "v1-T4096.H4096.I1364.E8.K2-bf16-norm-gelu-bwd": "a width that 16 does not divide, gelu",
}
"""Case id -> why it is here. Gradients are compiled where the id ends in -bwd."""
