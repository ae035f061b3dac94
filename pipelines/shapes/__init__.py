"""Sizes of known models, and models without weights."""
