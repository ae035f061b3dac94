"""Keys that are pooled into virtual tokens in the same softmax."""
