"""Compute files, merges, losses, answers and training steps anew, in float64 where a formula allows it.

`files.py` reads experts, `merges.py` holds merge formulas, `model.py` reads rows, scores, answers and trains.
"""
