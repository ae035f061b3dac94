"""Where the estimates that tiles are chosen by stop."""

from __future__ import annotations

import math

MOST_MASS = 0.5  # of a strip that may be dropped
MOST_LOG_MASS = math.log(MOST_MASS)
MOST_SPREAD = 3.0  # standard deviations of scores in a tile that the error is linear in
