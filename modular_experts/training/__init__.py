"""Train experts on a base: `ExpertModule` as a LightningModule, learning-rate shapes, exact resume.

Schedules, export and reports are `callbacks/`; rows come from `data/`. Open `module.py` first. `route.py`
lets a router learn experts of a library.
"""
