"""The page, table and pictures that a sweep ends with."""
