"""Where the kernels run, and on which device."""
