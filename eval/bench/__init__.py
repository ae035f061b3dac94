"""How fast: attention, kernels, models, whole renderings."""
