"""`python -m diffpatch`."""

import sys

from diffpatch.cli import main

if __name__ == "__main__":
    sys.exit(main())
