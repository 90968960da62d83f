"""Devices that times are predicted for."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """Published limits, and ASSUMPTIONS: round numbers of what has been reported, to be replaced by measured ones.

    memory, l2: bytes per second. flop: operations per second of dense 16-bit products. shared: bytes of all blocks of a
    multiprocessor together. Assumed: l2, port (bytes per second into one multiprocessor: 64 a cycle), latency (seconds
    until what is asked for arrives), launch (seconds from kernel to kernel in a graph), plain_matrix (the share of
    `flop` that instructions of a single warp reach).
    """

    name: str
    architecture: str
    multiprocessors: int
    memory: float
    flop: float
    l2_bytes: int
    shared: int
    registers: int = 65536
    warps: int = 64
    blocks: int = 32
    l2: float = 5.5e12
    port: float = 64 * 1.755e9
    latency: float = 0.8e-6
    launch: float = 2e-6
    plain_matrix: float = 0.6


DEVICES = {one.name: one for one in (
    # NVIDIA H100 Tensor Core GPU datasheet and architecture white paper, SXM5.
    Device("H100", "sm_90", multiprocessors=132, memory=3.35e12, flop=989e12, l2_bytes=50 * 2**20, shared=228 * 1024),
)}
