"""The networks that scores are computed with."""
