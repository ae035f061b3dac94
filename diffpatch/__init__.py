"""diffpatch: faster diffusion transformers by cheaper attention, in one line."""

__version__ = "0.1.0"
