"""Tiles chosen by their content."""

from diffpatch.methods.dynamic.method import Dynamic

__all__ = ["Dynamic"]
