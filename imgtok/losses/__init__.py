"""Losses that need a network of their own: a discriminator, LPIPS, REPA."""
