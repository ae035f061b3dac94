"""The method `temporal`."""

from diffpatch.methods.temporal.method import Temporal

__all__ = ["Temporal"]
