"""Compute files, merges, losses, answers and training steps anew, in float64 where a formula allows it.

`files.py` reads experts, `merges.py` holds merge formulas, `model.py` reads rows, scores
and answers them, and `training.py` trains.
"""
