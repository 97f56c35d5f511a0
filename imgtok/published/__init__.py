"""Published checkpoints, one reader a method."""
