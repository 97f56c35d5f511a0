"""Losses that need a network of their own: a discriminator, LPIPS, a distance in EfficientNet-Lite0, REPA."""
