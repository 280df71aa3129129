"""Choose experts by the input: routers, their gates, and the mixtures that read them.

`router.py` is the contract of a router of your own; open it first. `gates.py` has what a router returns and how scores
become gates, `prompts.py` reads whole prompts for it, and `mixture.py` is the expert that obeys the gates.
`injection/routed.py` puts all of them into a model.
"""

from modular_experts.routing.arrow import Arrow, Energy
from modular_experts.routing.centroid import Centroid
from modular_experts.routing.classifier import Classifier
from modular_experts.routing.fixed import Constant, Oracle
from modular_experts.routing.gates import Gates, Selection, Softmax, Threshold, TopK, UpTo
from modular_experts.routing.kernel_ridge import KernelRidge
from modular_experts.routing.mixture import Mixture
from modular_experts.routing.phatgoose import Phatgoose
from modular_experts.routing.router import Router

DEFAULT_ROUTER = KernelRidge
"""The router of `route` and `combine` where the user names none; `docs/results/routing.md` compares it with others."""

__all__ = ["DEFAULT_ROUTER", "Arrow", "Centroid", "Classifier", "Constant", "Energy", "Gates", "KernelRidge"]
__all__ += ["Mixture", "Oracle", "Phatgoose", "Router", "Selection", "Softmax", "Threshold", "TopK", "UpTo"]
