"""What a method would save, and how long a run would take, before it runs."""
