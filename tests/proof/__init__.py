"""Tests for small wrong edits that the tests of each part once did not notice, and their kinds."""
