"""Make a smaller base: search which blocks, heads and MLP channels stay, correct the layers that read them.

The paper is Search for efficient LLMs (arXiv 2409.17372). Candidates are measured by their perplexity as they are cut;
only the best is corrected, and no weight is trained.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modular_experts.base import Base
from modular_experts.base.device import device
from modular_experts.base.files import MANIFEST, copy_companions, quiet_transformers, write_manifest
from modular_experts.base.streaming import Rounding
from modular_experts.base.verify import Check, check_reloaded, fixed_prompts, logits
from modular_experts.data import TaskMixture
from modular_experts.data.batch import Example
from modular_experts.data.tasks import Tasks
from modular_experts.library import check_target, new_directory
from modular_experts.library.record import package_versions
from modular_experts.reports.json_lines import JSONLines
from modular_experts.systems.compress.candidates import Candidates, Members, Window, rank
from modular_experts.systems.compress.reform import reform
from modular_experts.systems.compress.removable import Kept, Removable
from modular_experts.systems.evolution import Evolution, Genes

_TRIALS = "search.jsonl"
_TOLERANCE = 1e-3  # largest accepted difference of a logit between the model in memory and the reloaded checkpoint


@dataclass(frozen=True)
class Reduction:
    """How much of a base goes, and how that is searched.

    Args:
        keep: The most parameters, as a share in (0, 1).
        slack: The fewest parameters are `keep - slack` of them.
        evaluations: Candidates that the search measures.
        members: How a block's members are chosen. `importance` lets the search choose between two rankings; `masks`
            starts from the members with the best of the paper's scores (`Ranking.entrywise`) and lets it exchange some
            of them, as the paper's text does.
        multiple: Divisor of the width of an MLP, unless it keeps all channels; GPUs multiply such matrices faster.
        tokens: Training tokens that rank and correct; take several times the width of an MLP.
        search_tokens: Tokens of validation rows that measure a candidate.
        test_tokens: Tokens of test rows for the closing measurement.
        length: Tokens of a pass.
        seed: Seed of the search. Equal seeds find equal models.
    """

    keep: float
    slack: float = 0.02
    evaluations: int = 48
    members: Members = "importance"
    multiple: int = 8
    tokens: int = 8192
    search_tokens: int = 1024
    test_tokens: int = 4096
    length: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, example in (("keep", self.keep, 0.8), ("slack", self.slack, 0.02)):
            if not 0 < value < 1:
                raise ValueError(f"{name}={value} must be in (0, 1), such as {example}")
        if self.members not in get_args(Members):
            raise ValueError(f"members={self.members!r} must be one of {', '.join(map(repr, get_args(Members)))}")
        least = {"evaluations": 1, "multiple": 1, "tokens": 2, "search_tokens": 2, "test_tokens": 2, "length": 2}
        for name, lowest in least.items():
            value = getattr(self, name)
            if value < lowest:
                raise ValueError(f"{name}={value} must be at least {lowest}")

    def window(self, removable: Removable) -> Window:
        """Return the sizes that a smaller model may have."""
        return Window(removable, self.keep, self.slack, self.multiple)


@dataclass(frozen=True)
class Compressed:
    """What `compress` found and wrote.

    Attributes:
        base, parameters: Parameters of the base and of the checkpoint.
        blocks: Numbers of the base's blocks that stay.
        all_blocks: How many blocks the base has.
        sizes: How many `groups` of heads (1 of 1 if they cannot be removed) and how many `channels` of its MLP a block
            keeps, each with the number in the base.
        perplexity: On the test rows, the perplexity of the `base`; of the best candidate (`cut`); and of this candidate
            after its layers were corrected (`reformed`; absent if it lost only whole blocks).
        written: Whose weights the checkpoint has: `cut` or `reformed`, whichever has the lower perplexity on the
            validation rows.
        tokens: How many tokens of the test rows were measured.
        searched: Perplexity on the validation rows of each candidate, in the order of the search.
        check: How far the checkpoint, loaded again, is from the model in memory.
    """

    base: int
    parameters: int
    blocks: tuple[int, ...]
    all_blocks: int
    sizes: dict[str, tuple[int, int]]
    perplexity: dict[str, float]
    written: Literal["cut", "reformed"]
    tokens: int
    searched: list[float]
    check: Check


Progress = Callable[[str, float, float], None]
Number = TypeVar("Number")


def compress(
    base: str | Path | Base,
    tasks: Tasks,
    out: str | Path,
    reduction: Reduction,
    revision: str | None = None,
    overwrite: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> Compressed:
    """Write a smaller base with at most `keep` of the parameters, an ordinary checkpoint that needs no training.

    Transformer blocks, groups of attention heads and MLP channels are removed: which, an evolution searches on
    validation rows; training rows rank them and correct the layers that read them; test rows are only measured. If the
    correction makes the perplexity on the validation rows worse, the checkpoint has the uncorrected weights. An
    interrupted search goes on where it stopped.

    Args:
        base: A directory or hub id, or an opened base.
        tasks: Tasks whose rows are the text, as for `TaskMixture`.
        reduction: How much goes, and how that is searched: `Reduction(keep=0.8)`.
        progress: Called with the stage, the work done and all work: blocks to rank, candidates, blocks to correct.

    Raises:
        FileExistsError: `out` is there and may not be replaced; nothing has been read yet.
        ValueError: The base has no parts of a known form, no sizes fit the window, or the tasks have no text; the model
            has not been loaded then. Or its weights do not have the sizes that their names imply, or the reloaded
            checkpoint differs from the model in memory; then nothing is written.
    """
    target = check_target(out, overwrite, MANIFEST)
    opened = Base.open(base, revision=revision)
    reduction.window(Removable(opened.structure.model, opened.place)).check()
    amounts = {"train": reduction.tokens, "validation": reduction.search_tokens, "test": reduction.test_tokens}
    texts = read_texts(tasks, opened.tokenizer(), amounts, reduction.length)
    settings = asdict(reduction) | {f"{split}_tokens": text.numel() for split, text in texts.items()}
    model: Any = opened.load()
    stored = model.dtype
    # Parameter by parameter: `model.to` would touch the tables of positions too.
    _cast(model, torch.promote_types(stored, torch.float32))
    model.to(device())
    removable = Removable(model, opened.place)
    work = json.dumps([opened.fingerprint, settings, [text.tolist() for text in texts.values()], package_versions()])
    with new_directory(target, overwrite, MANIFEST, work) as temporary:
        small, kept, facts = _made(removable, reduction, texts, temporary / _TRIALS, progress)
        (temporary / _TRIALS).unlink()
        _cast(small, stored)
        prompts = fixed_prompts(small)
        with quiet_transformers():
            small.save_pretrained(temporary, max_shard_size="5GB")
            copy_companions(opened.directory, temporary)
            check = check_reloaded(temporary, prompts.cpu(), logits(small, prompts).cpu(), _TOLERANCE, Rounding())
        done = Compressed(**facts, check=check)
        members = {
            "groups": {str(block): groups.tolist() for block, groups in kept.groups.items()},
            "channels": {str(block): channels.tolist() for block, channels in kept.channels.items()},
        }
        from_base = {"id": opened.place, "revision": opened.revision, "fingerprint": opened.fingerprint}
        write_manifest(temporary, {"base": from_base, "settings": settings, "kept": members, "found": asdict(done)})
    progress("writing", 1, 1)
    return done


def _made(
    removable: Removable, reduction: Reduction, texts: dict[str, Tensor], trials: Path, progress: Progress
) -> tuple[PreTrainedModel, Kept, dict[str, Any]]:
    """Return the smaller model, the parts that stay, and the fields of `Compressed` but the last."""
    depth = removable.blocks

    def stage(what: str, before: int) -> Callable[[int], None]:
        return lambda done: progress(what, before + done, 2 * depth + reduction.evaluations)

    ranking = rank(removable, texts["train"], progress=stage("ranking", 0))
    candidates = Candidates(reduction.window(removable), ranking, reduction.members)
    kept, values = _search(candidates, reduction, texts["validation"], trials, stage("searching", depth))
    small = removable.cut(kept)
    perplexities = {"base": perplexity(removable.model, texts["test"]), "cut": perplexity(small, texts["test"])}
    written = "cut"
    correcting = stage("correcting", depth + reduction.evaluations)
    if reform(removable, kept, small, texts["train"], correcting):
        perplexities["reformed"] = perplexity(small, texts["test"])
        # Less error of each layer on the training rows can be more perplexity, if there are few of these rows.
        if perplexity(small, texts["validation"]) <= min(values):
            written = "reformed"
        else:
            small = removable.cut(kept)
    first = kept.blocks[0]
    groups = len(kept.groups[first])
    channels = len(kept.channels[first])
    facts = {
        "base": removable.parameters,
        "parameters": removable.count(len(kept.blocks), groups, channels),
        "blocks": kept.blocks,
        "all_blocks": depth,
        "sizes": {"groups": (groups, removable.groups), "channels": (channels, removable.channels)},
        "perplexity": perplexities,
        "written": written,
        "tokens": texts["test"].numel(),
        "searched": values,
    }
    return small, kept, facts


def _search(
    candidates: Candidates, reduction: Reduction, text: Tensor, trials: Path, progress: Callable[[int], None]
) -> tuple[Kept, list[float]]:
    def measure(genes: Genes) -> float:
        return perplexity(candidates.window.removable.cut(candidates.kept(genes)), text)

    def reported(numbers: Iterable[Number]) -> Iterator[Number]:
        for done, number in enumerate(numbers, start=1):
            yield number
            progress(done)

    # A candidate has two or three genes for each block. Few change at once, because most changes of many are worse.
    first = candidates.first(max(1, reduction.evaluations // 4))
    search = Evolution(reduction.evaluations, first=1, mutation=0.05, seed=reduction.seed).search
    evolved = search(candidates.space, measure, first, candidates.within, JSONLines(trials), reported)
    return candidates.kept(evolved.best), [value for _, value in evolved.measured]


@torch.no_grad()
def _cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)


def read_texts(
    tasks: Tasks, tokenizer: PreTrainedTokenizerBase, tokens: dict[str, int], length: int
) -> dict[str, Tensor]:
    """Return token ids `(rows, length)` of each split: inputs and targets one after the other, tasks taking turns.

    `tokens` tells by split how many are taken at most. A text that is shorter than `length` makes one shorter row.
    """
    mixture: Any = TaskMixture(tasks, tokenizer)
    mixture.setup()
    loaders = {"train": mixture.train_dataloader, "validation": mixture.val_dataloader, "test": mixture.test_dataloader}
    texts = {}
    for split, most in tokens.items():
        by_task: dict[str, list[Example]] = {}
        rows = loaders[split]().dataset
        for row in (rows[number] for number in range(len(rows))):
            by_task.setdefault(row.task, []).append(row)
        in_turns = [row for row in chain.from_iterable(zip_longest(*by_task.values())) if row is not None]
        stream = torch.cat([row.tokens.ids for row in in_turns]).long()[:most]
        width = min(length, len(stream))
        texts[split] = stream[: len(stream) // width * width].view(-1, width)
    return texts


@torch.no_grad()
def perplexity(model: PreTrainedModel, text: Tensor) -> float:
    """Return the exponential of the mean loss of each token of `text` `(rows, tokens)` but a row's first."""
    losses = []
    for part in text.to(model.device).split(4):
        logits = model(part, use_cache=False).logits[:, :-1]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses.append(F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="none"))
    return torch.cat(losses).double().mean().exp().item()
