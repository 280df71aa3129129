"""This room compiles C++ on first use, and has passes over the entries of sparse deltas written in it.

`build.py` compiles and loads a C++ file, `kernels/native.cpp` too, which shares the vectors of `lanes.h`.
`sparse_passes.py` calls passes over entries, and `products.py` the products of inputs with deltas. Without a compiler,
the callers compute the same in torch.
"""
