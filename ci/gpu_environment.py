"""What the machine of the GPU lane is: versions, devices, driver and clocks, as one JSON document.

usage: python -m ci.gpu_environment FILE [--device cuda]
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from importlib.metadata import distributions
from pathlib import Path

import click
import torch

from ci.gpu_steps import compute_sanitizer
from moe_ref.bench.memory import free_bytes
from moe_ref.verify.run.environment import environment

_QUERY = ("name", "uuid", "driver_version", "vbios_version", "pstate", "temperature.gpu", "power.draw", "power.limit",
          "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "clocks_throttle_reasons.active",
          "memory.total", "memory.used", "ecc.mode.current", "mig.mode.current", "persistence_mode",
          "pcie.link.gen.current")
_PACKAGES = ("numpy", "safetensors", "msgspec", "click", "rich", "ruamel.yaml", "jinja2", "matplotlib", "vllm",
             "sglang", "sgl-kernel", "flashinfer-python", "triton_kernels", "deep_gemm", "transformer-engine")
_VARIABLES = ("CUDA", "NVIDIA", "TORCH", "PYTORCH", "TRITON", "NCCL", "OMP")


def _smi() -> dict[str, dict[str, str]]:
    """By device; one question at a time where a driver does not know them all, and refuses all for that."""
    found: dict[str, dict[str, str]] = {}
    for names in ([_QUERY], [(name,) for name in _QUERY]):
        for some in names:
            done = subprocess.run(["nvidia-smi", f"--query-gpu={','.join(some)}", "--format=csv,noheader"],
                                  capture_output=True, text=True, timeout=10, check=False)
            for device, line in enumerate(done.stdout.splitlines() if done.returncode == 0 else []):
                found.setdefault(str(device), {}).update(zip(some, map(str.strip, line.split(",")), strict=False))
        if found:
            break
    return found


def _devices() -> list[dict[str, str]]:
    return [{"name": one.name, "capability": f"sm_{one.major}{one.minor}", "multiprocessors": str(
        one.multi_processor_count), "memory_gib": f"{one.total_memory / 2**30:.1f}"}
        for one in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))]


def _packages() -> dict[str, str]:
    wanted = {name.replace("_", "-").lower() for name in _PACKAGES}
    return {one.name: one.version for one in distributions()
            if one.name and one.name.replace("_", "-").lower() in wanted}


def _host() -> dict[str, str]:
    return {"system": platform.platform(), "python": sys.version, "cpu_count": str(os.cpu_count()),
            "free_gib": f"{free_bytes('cpu') / 2**30:.1f}", "torch": torch.__config__.show()}


def _tools() -> dict[str, str]:
    """Triton starts a kernel through a C program that it builds: a compiler and Python's headers are needed."""
    found = {name: shutil.which(name) or "not there" for name in ("cc", "gcc", "clang", "nvcc", "nvidia-smi")}
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return found | {"compute-sanitizer": compute_sanitizer() or "not there",
                    "Python.h": str(headers) if headers.exists() else "not there"}


def _variables() -> dict[str, str]:
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith(_VARIABLES)}


def facts(device: str) -> dict[str, object]:
    """By section; what cannot be found out stands there as words."""
    sections: dict[str, Callable[[], object]] = {"host": _host, "packages": _packages, "tools": _tools,
                                                     "variables": _variables}
    if device == "cuda":
        sections |= {"devices": _devices, "nvidia_smi": _smi}
    sections["record"] = lambda: environment(device)
    found: dict[str, object] = {}
    for name, section in sections.items():
        try:
            found[name] = section()
        except Exception as error:
            found[name] = f"not found out: {type(error).__name__}: {error}"
    return found


@click.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cuda", show_default=True)
def main(file: Path, device: str) -> None:
    """Write FILE; exit code 3 where a section could not be found out."""
    found = facts(device)
    file.write_text(json.dumps(found, indent=1) + "\n")
    failed = [name for name, section in found.items() if isinstance(section, str)]
    for name in failed:
        click.echo(f"{name}: {found[name]}")
    record = found["record"]
    if isinstance(record, dict):
        click.echo(", ".join(f"{name} {record[name]}" for name in ("device", "driver", "torch", "triton", "hardware")
                             if name in record))
    sys.exit(3 if failed else 0)


if __name__ == "__main__":
    main()
