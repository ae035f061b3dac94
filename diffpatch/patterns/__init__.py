"""Where tokens live, how they are cut into tiles, and which pairs of tiles are kept."""
