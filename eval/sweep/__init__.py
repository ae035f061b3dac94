"""Many methods on many prompts, resumable, with a report."""
