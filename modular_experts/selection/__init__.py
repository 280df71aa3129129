"""Choose which entries experts train, while they train; `callbacks.MaskSchedule` decides when.

`choice.py` makes one choice, `scoring.py` takes the gradients for it, `avoid.py` keeps away from the entries of other
experts, and `exchange.py` moves values and optimizer state to the new support. Open `choice.py` first.
"""
