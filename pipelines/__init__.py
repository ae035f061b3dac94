"""What diffpatch knows about models: families, loading, the built-in demo pipeline."""
