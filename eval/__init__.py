"""Measuring: speed, quality, reports. Uses only the public API of diffpatch."""
