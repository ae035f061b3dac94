"""What `accelerate launch` starts in test_eval_processes: the same commands in every process."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from diffpatch.cli import main

if __name__ == "__main__":
    torch.set_num_threads(1)
    for words in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        if code := main(words):
            sys.exit(code)
