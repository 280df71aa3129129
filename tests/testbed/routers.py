"""Routers that have learned a model's own prompts."""

import torch

from modular_experts.routing import Centroid
from modular_experts.routing.prompts import prompt_vectors


def centroid(model: torch.nn.Module, **settings: object) -> Centroid:
    """Return a router of three experts, whose prompts have tokens of their own."""
    made = torch.Generator().manual_seed(5)
    router = Centroid(**{"reject": None} | settings)  # type: ignore[arg-type]
    prompts = []
    for number in range(3):
        ids = 5 + 20 * number + torch.randint(0, 12, (24, 6), generator=made)
        prompts.append(torch.cat(prompt_vectors(model, ids, None, router.depths), 1))
    router.learn([], prompts)
    return router
