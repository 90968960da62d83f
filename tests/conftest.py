"""One thread per worker, set before NumPy and torch are imported: oversubscribed BLAS is tens of times slower."""

import os

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"
# The tests are the CPU's, and their ranks are forked: autograd forbids that once it has a thread for a device.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
# Under `moe-ref lanes run` a lane has a name; runs that tests start are none of its.
os.environ.pop("MOE_LANE", None)

import pytest
import torch

torch.set_num_threads(1)
# It looks for devices once, in its first pass; in a CUDA build fake tensors pretend one (_ensureCUDADeviceGuardSet).
torch.ones((), requires_grad=True).backward()

pytest_plugins = ["pytester", "tests.made_lanes", "tests.nightly"]


@pytest.fixture(autouse=True)
def _single_thread() -> None:
    torch.set_num_threads(1)
