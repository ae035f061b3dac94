"""The transformers diffpatch knows: one row a family."""
