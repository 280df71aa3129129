"""LoRAHub (arXiv 2307.13269): one coefficient for each expert, found without gradients."""
