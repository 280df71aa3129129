"""Choose experts by the input: routers, their gates, and the mixtures that read them.

`router.py` is the contract of a router of your own; open it first. `gates.py` has what a router returns and how scores
become gates, `mixture.py` the expert that obeys them; each router has a file. They need torch alone. Routers are put
into a model by `injection/routed.py`.
"""

from modular_experts.routing.centroid import Centroid
from modular_experts.routing.gates import Gates, Softmax, Threshold, TopK
from modular_experts.routing.goat import GOATExpert
from modular_experts.routing.hilo import HiLo
from modular_experts.routing.mixture import Mixture
from modular_experts.routing.molora import MoLoRAExpert
from modular_experts.routing.oracle import Oracle
from modular_experts.routing.router import Router

__all__ = [
    "Centroid",
    "GOATExpert",
    "Gates",
    "HiLo",
    "Mixture",
    "MoLoRAExpert",
    "Oracle",
    "Router",
    "Softmax",
    "Threshold",
    "TopK",
]
