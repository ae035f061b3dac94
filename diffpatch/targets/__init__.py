"""From curves of error against kept fraction to the settings that a target needs."""
