"""Whether every shipped kernel compiles, without a GPU."""
