"""What a caller asked for: settings, the schedule of dense steps, and what combines with what."""
