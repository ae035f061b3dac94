"""Settings and weights found by looking at what a method does to a model."""
