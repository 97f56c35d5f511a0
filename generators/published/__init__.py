"""Published checkpoints of generators, one reader a method."""
