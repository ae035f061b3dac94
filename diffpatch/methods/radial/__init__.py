"""The method `radial`."""

from diffpatch.methods.radial.method import Radial

__all__ = ["Radial"]
