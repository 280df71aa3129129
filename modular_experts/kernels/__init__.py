"""Kernels: the gradient of only the kept entries of a weight, one way per file, and the rule that chooses one; and, in
`entries`, compiled passes over the entries of sparse deltas.
"""

from modular_experts.kernels.choice import Backend, check_backend, make_kernel
from modular_experts.kernels.kernel import KeptGradient
from modular_experts.kernels.linear import computed_in, kept_linear

__all__ = ["Backend", "KeptGradient", "check_backend", "computed_in", "kept_linear", "make_kernel"]
