"""Images and tokens, from files to batches.

`images.open_images` opens any source (folder, Parquet, tar, Hub, built-in shapes), `loaders` makes batches
of it, and `tokens` keeps what a tokenizer makes of it. A new source is a `Records` class (sources.py) and a
line in images.py.
"""
