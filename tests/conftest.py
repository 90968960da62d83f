"""One thread per worker, set before NumPy and torch are imported: oversubscribed BLAS is tens of times slower."""

import os

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"

import pytest
import torch

torch.set_num_threads(1)

pytest_plugins = ["pytester"]


@pytest.fixture(autouse=True)
def _single_thread() -> None:
    torch.set_num_threads(1)
