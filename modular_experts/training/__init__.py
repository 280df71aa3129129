"""Training: `ExpertModule`, the LightningModule around a base with experts, its learning rates and exact resume.

Open `module.py` first.
"""
