"""Native: C++ that is built on first use, and passes over the entries of sparse deltas written in it.

`build.py` builds and loads a C++ file; `sparse_passes.py` calls the passes. Without a compiler the callers do the same
in torch.
"""
