"""What a run ran on, for the record."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version

import torch
from torch.distributed import is_nccl_available

from moe_ref.verify.hardware import hardware_class


def default_device() -> str:
    """cuda where there is one, cpu otherwise."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """The commit checked out in the current folder, marked if files differ from it; "" outside a repository."""
    try:
        done = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=10"], capture_output=True, text=True,
                              timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def environment(device: str) -> dict[str, str]:
    """Versions, commit and device, and how its matrix products round; `device` names what baselines are kept for."""
    facts = {"python": platform.python_version(), "torch": str(torch.__version__), "triton": _version("triton"),
             "numpy": _version("numpy"), "system": f"{platform.system()} {platform.machine()}",
             "cpu_count": str(os.cpu_count()), "commit": _commit(), "device": "cpu", "kernels": "Triton interpreter"}
    if device == "cuda":
        facts |= {"device": torch.cuda.get_device_name(0), "device_count": str(torch.cuda.device_count()),
                  "capability": "sm_" + "".join(map(str, torch.cuda.get_device_capability(0))),
                  "cuda": str(torch.version.cuda), "driver": _driver(), "kernels": "compiled",
                  "nccl": ".".join(map(str, torch.cuda.nccl.version())) if is_nccl_available() else "not built in"}
    return facts | hardware_class(device).words()


def _driver() -> str:
    """Of the first device, as nvidia-smi calls it; torch knows the API's version alone."""
    try:
        done = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"],
                              capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"
