"""Loading a pipeline and calling it."""
