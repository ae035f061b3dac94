"""The methods, one file each, and their registry."""

from diffpatch.methods.base import Method, MethodInfo, make_method, methods, register
from diffpatch.methods.neighborhood import Neighborhood
from diffpatch.methods.radial import Radial
from diffpatch.methods.window import Window

__all__ = [
    "Method",
    "MethodInfo",
    "Neighborhood",
    "Radial",
    "Window",
    "make_method",
    "methods",
    "register",
]
