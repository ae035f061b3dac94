"""What belongs to a run: who calls, which step and branch a forward is, what is remembered."""
