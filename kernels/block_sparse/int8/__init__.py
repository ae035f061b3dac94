"""Scores of queries and keys rounded to 8 bits."""
