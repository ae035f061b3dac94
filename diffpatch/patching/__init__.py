"""The verbs of a patch, and what happens inside a patched transformer."""
