"""Attention to tiles that are switched on or off one by one."""
