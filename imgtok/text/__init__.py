"""Captions, and the encoders that read them."""
