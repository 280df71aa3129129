"""Selection: which entries are trained, chosen while training; `callbacks.MaskSchedule` conducts it.

`choice.py` makes one choice, `scoring.py` takes its gradients, `avoid.py` keeps away from other experts,
`optimizer_state.py` moves the optimizer's state along.
"""
