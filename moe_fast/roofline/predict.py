"""Seconds of a product on a device: the slowest of what each wave of programs needs, waves one after the other.

The roofline (doi 10.1145/1498765.1498785) with what keeps a kernel below it: idle multiprocessors of the last wave,
tiles that are not full, bytes in flight that are too few for the latency (Little's law), a slower matrix instruction.
"""

from collections import defaultdict
from dataclasses import dataclass

from moe_fast.compile.resources import Resources
from moe_fast.roofline.devices import Device
from moe_fast.roofline.product import Product
from moe_fast.roofline.walk import Wave, waves

_FULL_RATE = ("HGMMA", "UTC")
_RESERVED = 1024
"""Bytes of shared memory that CUDA keeps per block."""


@dataclass(frozen=True)
class ProductTime:
    """seconds: from launch to end. bound: what most of it waits for. least: by the two limits of the device alone.

    per_multiprocessor: blocks that fit there at once. waves: rounds of programs.
    """

    seconds: float
    least: float
    bound: str
    programs: int
    per_multiprocessor: int
    waves: int
    num_bytes: int
    padded_flop: float

    @property
    def of_limit(self) -> float:
        """Share of the limit that is reached."""
        return self.least / self.seconds


def predict(product: Product, found: Resources, device: Device) -> ProductTime:
    """Of one launch, with an L2 cache that holds none of its operands at the start."""
    fitting = blocks_per_multiprocessor(product.warps, found, device)
    walked = waves(product, fitting * device.multiprocessors, device.l2_bytes)
    total = device.launch + device.latency
    waited = defaultdict[str, float](float, {"start": total})
    for wave in walked:
        needs = _needs(wave, product, found, device)
        bound = max(needs, key=lambda name: needs[name])
        total += needs[bound]
        waited[bound] += needs[bound]
    programs = sum(wave.programs for wave in walked)
    least = max(product.least_bytes / device.memory, product.flop / device.flop)
    return ProductTime(total, least, max(waited, key=lambda name: waited[name]), programs, fitting, len(walked),
                       sum(wave.num_bytes for wave in walked), programs * product.program_flop)


def blocks_per_multiprocessor(warps: int, found: Resources, device: Device) -> int:
    """By registers (in units of 8 per thread), shared memory and warps; at least one."""
    registers = -(-max(found.registers, 1) // 8) * 8 * 32 * warps
    return max(1, min(device.blocks, device.warps // warps, device.registers // registers,
                      device.shared // (found.shared_bytes + _RESERVED)))


def _needs(wave: Wave, product: Product, found: Resources, device: Device) -> dict[str, float]:
    """Seconds by what a wave may wait for; a multiprocessor has the programs of the fullest one."""
    most = -(-wave.programs // device.multiprocessors)
    program_bytes = wave.asked / wave.programs
    rate = device.flop / device.multiprocessors
    if not any(name.startswith(_FULL_RATE) for name in found.matrix):
        rate *= device.plain_matrix
    return {"memory": wave.num_bytes / device.memory, "L2": wave.asked / device.l2,
            "port": most * program_bytes / device.port, "matrix": most * product.program_flop / rate,
            "latency": -(-product.steps // max(1, product.stages - 1)) * device.latency}
