"""The method `larger`: frames beyond the trained size."""

from diffpatch.methods.larger.method import Larger

__all__ = ["Larger"]
