"""The layer's stages as torch operators, torch.ops.moe_fast: kernels with fakes and gradients, without communication.

An operator works on what one rank holds and returns that rank's partial sum; nothing in it waits for the host.
"""
