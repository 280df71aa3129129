"""Read other tools' formats as experts, and write experts in them.

`import_expert.py` (open it first) brings in PEFT adapters (`peft/`), sparse fine-tunings (`sparse.py`) and full
checkpoints (`full_checkpoint.py`, with `compression.py`). `peft/` also writes adapters, `mergekit/` runs recipes of
mergekit, and `harness.py` measures by the lm-evaluation-harness.
"""
