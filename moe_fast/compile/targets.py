"""Architectures that kernels are compiled for, and what one block may take there."""

from dataclasses import dataclass

from triton.backends.compiler import GPUTarget


@dataclass(frozen=True)
class Architecture:
    """A target of the compiler; shared_memory: bytes one block may have, which the compiler does not enforce.

    Sources: CUDA C++ programming guide, table of technical specifications per compute capability; AMD CDNA 3
    instruction set architecture, LDS.
    """

    name: str
    target: GPUTarget
    shared_memory: int

    @property
    def is_nvidia(self) -> bool:
        return self.target.backend == "cuda"


ARCHITECTURES = {one.name: one for one in (
    Architecture("sm_80", GPUTarget("cuda", 80, 32), 163 * 1024),
    Architecture("sm_90", GPUTarget("cuda", 90, 32), 227 * 1024),
    Architecture("sm_100", GPUTarget("cuda", 100, 32), 227 * 1024),
    Architecture("gfx942", GPUTarget("hip", "gfx942", 64), 64 * 1024),
)}
