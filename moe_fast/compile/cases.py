"""Layers whose launches are compiled with every change: together they reach every kernel, forward tile and dtype.

Per-rank shapes of published models; a test compares what they launch with the kernels that there are.
"""

_MIXTRAL = "v1-mixtral.8x7b"

CASES = {
    # Every tile: 1, 32, 64 rows per expert, and more.
    "v1-deepseek.v3.T1-bf16-tp8-allreducerows":
        "decode of one token, rows reduced before the merge: what can be 1 is 1; 256 experts, groups, a shared expert",
    "v1-gptoss.120b.T1024-bf16-tp8-gather-bwd": "32 rows per expert; biases and limits; both halves by themselves",
    f"{_MIXTRAL}.T256-bf16-tp8": "64 rows per expert",
    f"{_MIXTRAL}.T4096-bf16-tp8-bwd": "prefill",
    f"{_MIXTRAL}.T4096-fp32-tp8": "fp32, on the plain units",
    "v1-deepseek.v3.T1-bf16-nvfp4-tp8-allreducerows":
        "encoded experts: e2m1 under scales in e4m3, and a second scale for the sums",
    f"{_MIXTRAL}.T256-bf16-gptqorder32-tp8": "a group for every column",
    f"{_MIXTRAL}.T4096-bf16-awq32-tp8": "zero points, several blocks in a tile",
    "v1-gptoss.120b.T1024-bf16-fp8tensor-tp8-gather": "e4m3 times e4m3 under fixed scales; halves, biases and limits",
    f"{_MIXTRAL}.T256-bf16-mxfp8-tp8": "rows rounded under a scale for every 32 columns",
    f"{_MIXTRAL}.T4096-bf16-fp8block-tp8": "blocks of 128 x 128, on units for 8 bits where there are any",
    "v1-T4096.H4096.I1364.E8.K2-fp16-norm-cap600-gelu-bwd": "fp16, a width that 16 does not divide, gelu, a capacity",
}
"""Case id -> why it is here. Gradients are compiled where the id ends in -bwd."""

FP8_TRAINING = {"v1-T4096.H4096.I1792.E8.K2-fp16-norm-mlpbias-bwd":
                "operands of every product rounded, tiles of the most rows, biases"}
"""The same of layers that train in 8 bits."""
