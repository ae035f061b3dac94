"""What was learned for a method: files of ours, and checkpoints that others trained sparse."""
