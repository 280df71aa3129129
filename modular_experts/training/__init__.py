"""Train experts on a base: `fit` in one call, `ExpertModule` as a LightningModule, learning-rate shapes, exact resume.

Schedules, export and reports are `callbacks/`; rows come from `data/`. Open `fit.py` first, then `module.py`.
`route.py` lets a router learn experts of a library.
"""
