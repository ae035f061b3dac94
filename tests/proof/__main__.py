"""Random examples for as long as there is time: ``make fuzz MINUTES=30``.

Every round runs the property tests of this folder with other examples; the first that fails ends
it, with what repeats it: the example itself, and the seed of the round.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import time
from pathlib import Path

FOLDER = Path(__file__).parent


def main() -> int:
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, help="of the only round")
    args = parser.parse_args()
    files = sorted(map(str, FOLDER.glob("test_fuzz_*.py")))
    environment = {**os.environ, "DIFFPATCH_EXAMPLES": "fuzz", "OMP_NUM_THREADS": "1"}
    until = time.monotonic() + 60 * args.minutes
    rounds = 0
    while rounds == 0 or (args.seed is None and time.monotonic() < until):
        seed = random.randrange(2**31) if args.seed is None else args.seed
        words = [sys.executable, "-m", "pytest", "-x", f"--hypothesis-seed={seed}", "--timeout=0"]
        code = subprocess.run([*words, *files], env=environment, check=False).returncode
        if code:
            print(f"python -m tests.proof --seed {seed} repeats this", file=sys.stderr)
            return code
        rounds += 1
    print(f"{rounds} rounds found nothing", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
