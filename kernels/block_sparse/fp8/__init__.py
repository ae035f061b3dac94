"""Values and the weights they are summed with as 8-bit floats."""
