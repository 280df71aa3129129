"""This room compiles C++ on first use, and has passes over the entries of sparse deltas written in it.

`build.py` compiles and loads a C++ file; `sparse_passes.py` calls the passes. Without a
compiler, the callers compute the same in torch.
"""
