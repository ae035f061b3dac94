"""What tuned settings say, for people: a table, a page, and the picture of the front."""
