"""Block-sparse attention, the operator under every method."""
