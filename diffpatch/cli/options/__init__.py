"""What the commands take, one file each: parsed and explained by --help without loading torch."""
