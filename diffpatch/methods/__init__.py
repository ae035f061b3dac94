"""The methods, one file each, and their registry."""

from diffpatch.methods.base import Method
from diffpatch.methods.dense import Dense
from diffpatch.methods.disc import Disc
from diffpatch.methods.dynamic.method import Dynamic
from diffpatch.methods.larger import Larger
from diffpatch.methods.linear.method import Linear
from diffpatch.methods.longer import Longer
from diffpatch.methods.neighborhood import Neighborhood
from diffpatch.methods.radial.method import Radial
from diffpatch.methods.registry import MethodInfo, list_methods, make_method, register
from diffpatch.methods.sliding_tile import SlidingTile
from diffpatch.methods.temporal.method import Temporal
from diffpatch.methods.window import Window

__all__ = [
    "Dense",
    "Disc",
    "Dynamic",
    "Larger",
    "Linear",
    "Longer",
    "Method",
    "MethodInfo",
    "Neighborhood",
    "Radial",
    "SlidingTile",
    "Temporal",
    "Window",
    "list_methods",
    "make_method",
    "register",
]
