"""Whether what a lane needs is on this machine."""

import json
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass

from moe_ref.lanes.schema import Device

# In a process of its own: lanes are chosen and reported where there is no torch, and a driver that hangs is left alone.
_PROBE = """
import json, torch
found = []
for index in range(torch.cuda.device_count()):
    about = torch.cuda.get_device_properties(index)
    hip = torch.version.hip and about.gcnArchName.partition(":")[0]
    found.append([about.name, hip or f"sm_{about.major}{about.minor}"])
print(json.dumps(found))
"""
_PROBE_SECONDS = 120


@dataclass(frozen=True)
class Found:
    """What a lane runs on, in words; missing: why it cannot run here, "" where it can."""

    words: str
    missing: str = ""


def find_device(device: Device) -> Found:
    """The GPUs and programs that a lane asks for, as torch and the search path know them."""
    absent = [name for name in device.programs if shutil.which(name) is None]
    if absent:
        return Found("", f"no {' and no '.join(absent)} on the search path")
    if not device.gpus:
        return Found(f"cpu {platform.machine()}")
    gpus, failed = _gpus()
    fitting = [name for name, architecture in gpus if device.architecture in ("any", architecture)]
    if len(fitting) >= device.gpus:
        return Found(f"{len(fitting)}x {fitting[0]}")
    wanted = f"{device.gpus} GPU{'s' * (device.gpus > 1)}"
    if device.architecture != "any":
        wanted += f" of {device.architecture}"
    there = ", ".join(f"{name} ({architecture})" for name, architecture in gpus)
    return Found("", f"needs {wanted}, but {failed or f'torch finds {len(gpus)} here'}" + f": {there}" * bool(there))


def _gpus() -> tuple[list[tuple[str, str]], str]:
    """(name, architecture) of each, and why they could not be asked for."""
    try:
        done = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True, timeout=_PROBE_SECONDS,
                              check=False)
    except subprocess.TimeoutExpired:
        return [], f"torch did not answer in {_PROBE_SECONDS} s"
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return [], f"torch could not be asked ({last})"
    return [(name, architecture) for name, architecture in json.loads(done.stdout)], ""
