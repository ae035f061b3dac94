"""One thread a test process: small tensors gain nothing from more, and tests run side by side."""

import os

import torch

os.environ.setdefault("DIFFPATCH_CHOOSER", "off")  # tests that measure backends say so
torch.set_num_threads(1)
