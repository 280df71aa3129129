"""Run C++ where torch has no quick way: passes over sparse deltas, and products and gradients of only the kept entries.

`build.py` compiles and loads a C++ file on first use. `sparse_passes.py` calls passes over entries, and `products.py`
the products of inputs with deltas; without a compiler, their callers compute the same in torch. `kernel.py` is the
contract of kernels that make the gradient of only the kept entries of a weight. `kernel_choice.py` chooses among
`plain.py` (torch), `kept_gradients.py` (C++) and `triton_tiles.py` (CUDA).
"""
