"""What every test may rely on: fixed seeds, one thread, no network.

The environment is set before any test module imports a library that reads it.
"""

import os
import random

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"
# Triton interprets kernels, also beside a GPU; who compiles starts a process of its own.
os.environ["TRITON_INTERPRET"] = "1"

from collections.abc import Iterator

import numpy as np
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def _poisoned_memory() -> Iterator[None]:
    """Fill memory that nobody has written with NaN, so that reading it shows."""
    torch.use_deterministic_algorithms(True)  # its debug setting: fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
