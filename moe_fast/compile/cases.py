"""Layers whose launches are compiled with every change: together they reach every kernel, every tile and every dtype.

Per-rank shapes of published models; a test compares what they launch with the kernels that there are.
"""

_MIXTRAL = "v1-mixtral.8x7b"

CASES = {
    # Mixtral on 8 ranks at every tile: 1, 16, 32, 64 rows per expert, and more.
    f"{_MIXTRAL}.T1-bf16-tp8": "decode of one token: what can be 1 is 1",
    f"{_MIXTRAL}.T32-bf16-tp8": "decode of a batch",
    f"{_MIXTRAL}.T128-bf16-tp8": "32 rows per expert",
    f"{_MIXTRAL}.T256-bf16-tp8": "64 rows per expert",
    f"{_MIXTRAL}.T4096-bf16-tp8": "prefill",
    f"{_MIXTRAL}.T4096-fp16-tp8": "prefill in fp16",
    f"{_MIXTRAL}.T32-fp32-tp8": "decode on the plain units",
    f"{_MIXTRAL}.T4096-fp32-tp8": "prefill on the plain units",
    f"{_MIXTRAL}.T4096-bf16-tp8-gather": "both halves of the experts by themselves",
    f"{_MIXTRAL}.T32-bf16-tp8-allreducerows": "rows reduced before the merge",
    "v1-deepseek.v3.T4096-bf16-tp8": "256 experts, groups, a selection bias and a shared expert",
    "v1-T32.H256.I100.E4.K2-bf16-gelu": "widths that 16 does not divide, gelu",
    "v1-T32.H256.I128.E4.K2-bf16-gelutanh": "gelu by tanh",
}
"""Case id -> why it is here."""
