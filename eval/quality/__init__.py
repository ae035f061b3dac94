"""How good: scores of pairs and sets of images and videos."""
