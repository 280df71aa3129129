"""Train experts on a base: `fit` in one call, `ExpertModule` as a LightningModule, learning-rate shapes, exact resume.

Open `fit.py` first, then `module.py`. `export_expert.py`, `save_results.py` and `log_progress.py` are callbacks that
report, `even_validation.py` and `train_under_others.py` callbacks that change a training. Supports are chosen in
`selection/`; rows come from `data/`.
"""
