"""This room compiles C++ on first use, and has passes over the entries of sparse deltas written in it.

`build.py` compiles and loads a C++ file; `sparse_passes.py` and `decoding.py` call passes, `products.py` products of inputs
with deltas. It compiles `kernels/native.cpp` too. Without a compiler, the callers compute the same in torch.
"""
