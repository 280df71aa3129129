"""Let experts answer together: `with ensembled(model, experts): ...` averages what they predict for each next token."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from modular_experts.base.apply import AnyExpert
from modular_experts.injection.routed import routed
from modular_experts.routing.gates import Gates

Mean = Literal["probabilities", "logits"]
MEANS: tuple[Mean, ...] = get_args(Mean)


@contextmanager
def ensembled(
    model: nn.Module, experts: Sequence[AnyExpert], mean: Mean = "probabilities", check: bool = True
) -> Iterator[None]:
    """Let several experts answer as an ensemble of equal members, until the end of the `with` block.

    The logits of the model are then the logarithm of the mean of the members' next-token probabilities (the uniform
    ensemble of Lakshminarayanan et al., arXiv 1612.01474), or the mean of their logits, which is the geometric mean of
    their probabilities. Rows pass side by side: k experts take k times the time, activations, keys and values.

    Args:
        model: The experts' base, a causal language model of transformers, before anything is injected.
        experts: As for `routed`.
        mean: What is averaged.
        check: Whether the model must be the base of the stored experts.
    """
    if mean not in MEANS:
        raise ValueError(f"mean={mean!r} must be 'probabilities' or 'logits'")
    members = len(experts)
    device = next(model.parameters()).device
    with routed(model, experts, rows=[0], check=check) as inside, ExitStack() as hooks:

        def repeat(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            """Give every member the whole batch; what has one dimension, such as places in a cache, holds for all."""
            ids = named["input_ids"] if "input_ids" in named else args[0]
            rows = len(ids)
            numbers = torch.arange(members, device=device).repeat_interleave(rows)[:, None]
            inside.current.gates = Gates(numbers, torch.ones(numbers.shape, device=device))

            def repeated(value: object) -> object:
                if isinstance(value, Tensor) and value.dim() > 1 and len(value) == rows:
                    return torch.cat([value for _ in experts])
                return value

            return tuple(map(repeated, args)), {name: repeated(value) for name, value in named.items()}

        def stack(_: nn.Module, args: tuple[Any, ...]) -> tuple[object, ...]:
            """Put the members' hidden states beside each other: the head sees `(rows, length, members, size)`."""
            return torch.stack(args[0].chunk(members), 2), *args[1:]

        def average(_: nn.Module, args: object, named: Mapping[str, Any], output: Any) -> object:
            logits = output.logits.to(torch.promote_types(output.logits.dtype, torch.float32))
            if mean == "probabilities":
                output.logits = logits.log_softmax(-1).logsumexp(-2) - math.log(members)
            else:
                output.logits = logits.mean(-2)
            if output.get("loss") is not None:
                labels = named["labels"].chunk(members)[0]
                output.loss = loss_of(output.logits, labels, output.logits.shape[-1])
            return output

        of_transformers = cast(Any, model)
        head = of_transformers.get_output_embeddings()
        loss_of = of_transformers.loss_function
        hooks.callback(model.register_forward_pre_hook(repeat, with_kwargs=True).remove)
        hooks.callback(head.register_forward_pre_hook(stack).remove)
        hooks.callback(model.register_forward_hook(average, with_kwargs=True).remove)
        yield
