"""Everything about the kernels on one machine: first that they are right, then how fast."""
