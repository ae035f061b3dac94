"""Faults of disks, memory, processes and models, injected."""
