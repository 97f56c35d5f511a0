"""Scores of reconstructions and of generated images: features, streamed sums, distances, and what each needs.

`scorers` holds one class for each family of metrics; the job `sample/evaluate/job.py` feeds them. Metrics read uint8
images (B, 3, H, W), because rounding is part of what is scored.
"""
