"""The main figures: each module reads `results/` into points, and draws the points."""
