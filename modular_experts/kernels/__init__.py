"""Kernels compute the gradient of only the kept entries of a weight.

Open `kernel.py` first: the contract, and the layer that calls a kernel. `choice.py` chooses one. `plain.py` has kernels
in torch, `native.py` calls C++ on the CPU, `triton_tiles.py` is a program for CUDA.
"""

from modular_experts.kernels.choice import Backend, check_backend, make_kernel
from modular_experts.kernels.kernel import KeptGradient, computed_in, kept_linear, kept_weight

__all__ = ["Backend", "KeptGradient", "check_backend", "computed_in", "kept_linear", "kept_weight", "make_kernel"]
