"""Triton kernels, one stage a file; each file holds the kernel and the function that launches it."""
