"""Find coefficients one transformer block after another, in the memory of one block of all experts.

In each block, the merged model's hidden states come as near as possible to the states that each task's own expert has
there on its own inputs, as in ProDistill (Xu et al., ICML 2025), there with a coefficient for each entry.
"""

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from modular_experts.base.apply import applied
from modular_experts.data.batch import Batch
from modular_experts.deltas import Delta
from modular_experts.progress import Progress
from modular_experts.text import block_of
from modular_experts.tuning.combination import Combination
from modular_experts.tuning.gradient_search import descend, first_coefficients
from modular_experts.tuning.objective import Trial
from modular_experts.tuning.search import Found

Run = Callable[[Batch, Tensor | None], tuple[Tensor, Tensor]]


def distill_blocks(
    model: PreTrainedModel,
    batches: Mapping[str, list[Batch]],
    experts: Sequence[Mapping[str, Delta]],
    own: Mapping[str, Mapping[str, Delta]],
    learning_rate: float,
    steps: int,
    progress: Progress = iter,
) -> tuple[dict[str, Delta], Found]:
    """Return the deltas of the merge; and its coefficients, block after block, with the distances of each step.

    Args:
        model: The base, in evaluation mode.
        batches: Padded batches of each task; their hidden states are kept in them meanwhile.
        experts: Name and delta of each weight, read when its block comes; the first is the merge to start from. Its
            deltas outside of the blocks go into the result as they are, and act on no state during the search.
        own: The expert of each task.
        learning_rate, steps: Of `descend`, in each block.

    Raises:
        ValueError: The experts move no weight of a block.
    """
    names = sorted({name for expert in experts for name in expert})
    if not (inner := [block for block in map(block_of, names) if block]):
        raise ValueError(
            "by=block needs experts that move weights of transformer blocks; these do not, so take by=model"
        )
    found = {name: experts[0][name] for name in names if block_of(name) is None and name in experts[0]}
    parent = inner[0].rpartition(".")[0]
    every = [batch for own_batches in batches.values() for batch in own_batches]
    coefficients, trials = [torch.zeros(0, len(experts))], list[Trial]()
    for number in map(int, progress([str(one) for one in range(len(model.get_submodule(parent)))])):  # type: ignore[arg-type]
        run, block = _runner(model, parent, number), f"{parent}.{number}"
        inside = [name for name in names if block_of(name) == block]
        for task, expert in own.items():
            with (
                torch.no_grad(),
                applied(model, {name: expert[name] for name in inside if name in expert}, check=False),
            ):
                for batch in batches[task]:
                    if not number:
                        batch["states"] = torch.stack([run(batch, None)[0]] * 2, 2)
                    batch["states"][:, :, 1] = run(batch, batch["states"][:, :, 1])[1]
        members = [{name: expert[name] for name in inside if name in expert} for expert in experts]
        with Combination(model, members, 1) as combination:
            if inside:
                start, aim = first_coefficients(combination, "row", [1.0]), _distance_of(run)
                target: Any = SimpleNamespace(model=model, batches=batches, losses=dict)
                best = descend(combination, target, aim, start, learning_rate, steps, decay=True)
                found |= dict(combination.deltas(best.coefficients))
                coefficients.append(best.coefficients)
                trials += [Trial({"block": number, **one.settings}, one.losses) for one in best.trials]
            with torch.no_grad():
                for batch in every:
                    batch["states"][:, :, 0] = run(batch, batch["states"][:, :, 0])[1]
    for batch in every:
        del batch["states"]
    return found, Found(torch.cat(coefficients), {}, trials)


def _runner(model: PreTrainedModel, parent: str, number: int) -> Run:
    """Return a function from a batch and hidden states to the states before and behind one block of the model; without
    given states, the embeddings enter.
    """
    owner, _, attribute = parent.rpartition(".")
    holder, blocks = model.get_submodule(owner), model.get_submodule(parent)
    block = blocks[number]  # type: ignore[index]

    def run(batch: Batch, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
        seen: list[Tensor] = []

        def enter(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
            seen.append(given[0] if hidden is None else hidden)
            return (seen[0], *given[1:])

        def leave(_: nn.Module, given: tuple[Any, ...], output: Any) -> None:
            seen.append(output if isinstance(output, Tensor) else output[0])
            raise _Left

        hooks = [block.register_forward_pre_hook(enter), block.register_forward_hook(leave)]
        # The model makes masks and positions, and passes the states through this block alone.
        setattr(holder, attribute, nn.ModuleList([block]))
        try:
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        except _Left:
            return seen[0], seen[1]
        finally:
            setattr(holder, attribute, blocks)
            for hook in hooks:
                hook.remove()
        raise AssertionError

    return run


class _Left(Exception):
    """Ends a forward pass behind the block."""


def _distance_of(run: Run) -> Callable[[nn.Module, Batch], tuple[Tensor, Tensor]]:
    def distance(_: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return each row's squared distances over the squared lengths of the expert's states, and its tokens."""
        own, tokens = batch["states"][:, :, 1].float(), batch["attention_mask"]
        away = (run(batch, batch["states"][:, :, 0])[1].float() - own).square().sum(-1)
        # States of padding may be zero.
        return (tokens * away / (own.square().sum(-1) + 1 - tokens)).sum(1), tokens.sum(1)

    return distance
