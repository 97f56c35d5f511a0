"""Network blocks that tokenizers and generators share."""
