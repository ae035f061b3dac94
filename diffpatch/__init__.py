"""diffpatch: faster diffusion transformers by cheaper attention, in one line.

>>> diffpatch.patch(pipe, method="radial")    # in place; pipe is any supported diffusers pipeline
>>> print(diffpatch.report(pipe))             # after a run: what was computed
>>> diffpatch.unpatch(pipe)                   # bit for bit what it was
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffpatch.public import *  # noqa: F403

__version__ = "0.1.0"

if not TYPE_CHECKING:  # which knows what is public, and that there is nothing else

    def __getattr__(name: str) -> Any:
        """Load what is public at its first use: importing diffpatch alone does not load torch."""
        missing = AttributeError(f"module 'diffpatch' has no attribute {name!r}")
        if name.startswith("_") and name != "__all__":
            raise missing
        if importlib.util.find_spec(f"diffpatch.{name}") is not None:
            return importlib.import_module(f"diffpatch.{name}")
        public = importlib.import_module("diffpatch.public")
        if name != "__all__" and name not in public.__all__:
            raise missing
        value = globals()[name] = getattr(public, name)
        return value


def __dir__() -> list[str]:
    """What is public, and nothing that merely stands in the package."""
    return [*importlib.import_module("diffpatch.public").__all__, "__version__"]
