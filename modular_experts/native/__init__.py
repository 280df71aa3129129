"""Native: C++ that is compiled on first use, and passes over the entries of sparse deltas written in it.

`build.py` compiles and loads a C++ file; `sparse_passes.py` calls the passes. Where there is no compiler, the callers
compute the same in torch.
"""
