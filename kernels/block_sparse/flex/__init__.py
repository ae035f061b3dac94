"""Block-sparse attention by FlexAttention, torch's compiler of attention variants."""
