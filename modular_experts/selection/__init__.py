"""Choose which entries experts train, while they train; `callbacks.MaskSchedule` decides when.

`choice.py` makes one choice. `from_step.py` takes the gradients for it from a training step, `scoring.py` from passes
of its own. `exchange.py` moves values and optimizer state to the new support. Open `choice.py` first.
"""
