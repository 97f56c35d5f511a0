"""Tokenizers and the autoencoders below them, one file a method."""
