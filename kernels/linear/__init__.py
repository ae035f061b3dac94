"""Linear attention over tiles."""
