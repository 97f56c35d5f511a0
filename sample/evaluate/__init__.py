"""`imgtok evaluate`: what is scored, by which scores, and how the results are written."""
