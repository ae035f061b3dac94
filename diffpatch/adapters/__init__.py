"""Other ways in than `diffpatch.patch`, for people whose engine has a slot for attention.

Nothing happens at import. `patch` knows more (layers, steps, models, masks): prefer it.
"""
