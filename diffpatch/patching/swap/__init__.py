"""What stands in for parts of a model while a patch is on: processors, functions, hooks."""
