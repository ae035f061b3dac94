"""Block-sparse attention in PyTorch: which rows and keys share a call."""
