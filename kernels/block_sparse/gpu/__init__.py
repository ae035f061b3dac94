"""Block-sparse attention in Triton and Gluon."""
