"""Read other tools' formats as experts, and write experts in them.

`import_expert.py` (open it first) brings in PEFT adapters (`peft/`) and full checkpoints (`full_checkpoint.py`).
`peft/` also writes adapters, `mergekit/` runs recipes, and `servers.py` writes what vLLM, SGLang and llama.cpp load.
"""
