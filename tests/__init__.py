"""The tests of diffpatch. A package, so that they can share `tests.tiny`."""
