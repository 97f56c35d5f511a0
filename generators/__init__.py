"""Generators over image tokens; each file is one method, from its layers to its sampling."""
