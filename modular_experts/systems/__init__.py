"""The systems of related papers, one folder each; a folder holds all that its paper needs, and nothing else knows it.
Several of them build on `evolution.py`, `molora.py` and `schedules.py`.

The core imports nothing from here: it finds a system by listing the folders (`discovery.py`), so that short names and
commands work, and that a folder may go or come without another edit. `tt_lora/` is a short one with one expert.
"""
