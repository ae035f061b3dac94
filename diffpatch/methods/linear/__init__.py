"""The method `linear`."""

from diffpatch.methods.linear.method import Linear

__all__ = ["Linear"]
