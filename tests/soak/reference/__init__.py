"""Compute files, merges, losses, answers and training steps anew, in float64 where a formula allows it."""
