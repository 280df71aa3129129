"""Choose which entries experts train, while they train; the callback `MaskSchedule` decides when.

`schedule.py` is the contract of callbacks that change the trained entries, `mask_schedule.py` the schedule of supports.
`choice.py` makes one choice. `from_step.py` takes the gradients for it from a training step, `scoring.py` from passes
of its own. `exchange.py` moves values and optimizer state to the new support. Open `mask_schedule.py` first.
"""
