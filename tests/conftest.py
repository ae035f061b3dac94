"""One thread a test process: small tensors gain nothing from more, and tests run side by side.

Random examples are the same in every run, so that a failure can be repeated and a run that passed
passes again; `make fuzz` draws others (see `tests/proof/__main__.py`).
"""

import os
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

os.environ.setdefault("DIFFPATCH_CHOOSER", "off")  # tests that measure backends say so
torch.set_num_threads(1)

slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
# To explain a failure hypothesis traces every line of many examples: on models that takes minutes.
quick = [phase for phase in Phase if phase is not Phase.explain]
settings.register_profile("same", derandomize=True, deadline=None, database=None, phases=quick)
settings.register_profile("fuzz", deadline=None, print_blob=True, suppress_health_check=slow)
settings.load_profile(os.environ.get("DIFFPATCH_EXAMPLES", "same"))


@pytest.fixture(autouse=True)
def same_numbers() -> Iterator[None]:
    """What a test draws without a seed of its own is the same in every run, in any order."""
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(0)
    yield
