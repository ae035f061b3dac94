"""Which tiles are worth computing exactly, from their content."""
