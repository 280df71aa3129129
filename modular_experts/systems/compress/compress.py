"""Make a smaller base: search which blocks, heads and MLP channels stay, correct the layers that read them.

The paper is Search for efficient LLMs (arXiv 2409.17372). Candidates are measured by their perplexity as they are cut;
only the best is corrected, and no weight is trained.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modular_experts.base import Base
from modular_experts.base.files import MANIFEST, copy_companions, write_manifest
from modular_experts.base.loading import quiet
from modular_experts.base.streaming import Rounding
from modular_experts.base.verify import Check, check_reloaded, fixed_prompts, logits
from modular_experts.data import TaskMixture
from modular_experts.data.batch import Example
from modular_experts.data.rows import SPLITS
from modular_experts.data.tasks import Tasks
from modular_experts.jobs import JSONLines
from modular_experts.library import check_target, new_directory
from modular_experts.library.record import package_versions
from modular_experts.settings import Options
from modular_experts.systems.compress.candidates import Candidates, Members, Window, magnitude_removal
from modular_experts.systems.compress.ranking import Ranking, rank
from modular_experts.systems.compress.reform import LayerError, reform
from modular_experts.systems.compress.removable import Kept, Removable
from modular_experts.systems.evolution import Evolution, Genes

Written = Literal["base", "cut", "reformed"]
_TRIALS = "search.jsonl"
_MEASURED = 4  # models that are measured on the test rows: the base, and three smaller ones


@dataclass(frozen=True)
class Reduction(Options):
    """How much of a base goes, and how that is searched.

    Args:
        keep: The most parameters, as a share in (0, 1]; 1 copies the base.
        slack: The fewest parameters are `keep - slack` of them.
        evaluations: Candidates that the search measures.
        members: What a block keeps. `importance` lets the search choose between two rankings; `windows`
            lets it choose where a contiguous stretch starts, as the released code does; `masks` starts from the members
            with the best of the paper's scores (`Ranking.entrywise`) and lets it exchange some of them, as the paper's
            text does.
        multiple: Divisor of the width of an MLP, unless it keeps all channels; GPUs multiply such matrices faster.
        damping: Pull of corrected weights to old ones, as a share of the mean squared input.
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
    damping: float = 0.01
    tokens: int = 8192
    search_tokens: int = 1024
    test_tokens: int = 4096
    length: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep={self.keep} must be in (0, 1], the share of the parameters that stay, such as 0.8")
        if not 0 < self.slack < 1:
            raise ValueError(f"slack={self.slack} must be in (0, 1), such as 0.02")
        if not 0 < self.damping < math.inf:
            raise ValueError(f"damping={self.damping} must be a positive number, such as 0.01")
        if self.members not in get_args(Members):
            raise ValueError(f"members={self.members!r} must be one of {', '.join(map(repr, get_args(Members)))}")
        least = {"evaluations": 1, "multiple": 1, "tokens": 2, "search_tokens": 2, "test_tokens": 2, "length": 2}
        for name, lowest in least.items():
            if (value := getattr(self, name)) < lowest:
                raise ValueError(f"{name}={value} must be at least {lowest}")

    def window(self, removable: Removable) -> Window:
        """Return the sizes that a smaller model may have."""
        return Window(removable, self.keep, self.slack, self.multiple)

    def described(self, texts: dict[str, Tensor]) -> dict[str, Any]:
        """Return the settings for the manifest, with the number of tokens that there were."""
        names = ("keep", "slack", "evaluations", "members", "multiple", "damping", "seed", "length")
        counts = {f"{split}_tokens": text.numel() for split, text in texts.items()}
        return {name: getattr(self, name) for name in names} | counts

    def stages(self, texts: dict[str, Tensor]) -> dict[str, int]:
        """Return the work of each stage in tokens."""
        tokens = {split: text.numel() for split, text in texts.items()}
        if self.keep == 1:
            return {"measuring": tokens["test"]}
        search = {"ranking": 2 * tokens["train"], "searching": self.evaluations * tokens["validation"]}
        return {"measuring": _MEASURED * tokens["test"], **search, "correcting": 3 * tokens["train"]}


@dataclass(frozen=True)
class Compressed:
    """What `compress` found and wrote.

    Attributes:
        base: Parameters of the base.
        parameters: Parameters of the checkpoint.
        blocks: Numbers of the base's blocks that stay.
        all_blocks: How many blocks the base has.
        sizes: How many `groups` of heads (1 of 1 if they cannot be removed) and how many `channels` of its MLP a block
            keeps, each with the number in the base.
        perplexity: On the test rows, the perplexity of the `base`; of the base without the parts with the smallest
            weights in all blocks (`magnitude`, as in `magnitude_removal`; absent if it finds no such model); of the
            best candidate (`cut`); and of this candidate after its layers were corrected (`reformed`; absent if it lost
            only whole blocks). A copy of the base has only `base`.
        written: Whose weights the checkpoint has: `cut` or `reformed`, whichever has the lower perplexity on the
            validation rows, or `base`.
        tokens: How many tokens of the test rows were measured.
        layers: The error of each corrected layer on the calibration text.
        searched: Perplexity on the validation rows of each candidate, in the order of the search.
        check: How far the checkpoint, loaded again, is from the model in memory.
    """

    base: int
    parameters: int
    blocks: tuple[int, ...]
    all_blocks: int
    sizes: dict[str, tuple[int, int]]
    perplexity: dict[str, float]
    written: Written
    tokens: int
    layers: list[LayerError]
    searched: list[float]
    check: Check


@dataclass(frozen=True)
class _Made:
    """A smaller model with its measurements, by the names of `Compressed`."""

    model: PreTrainedModel
    kept: Kept
    written: Written
    perplexity: dict[str, float]
    layers: list[LayerError]
    searched: list[float]


def compress(
    base: str | Path | Base,
    tasks: Tasks,
    out: str | Path,
    reduction: Reduction,
    revision: str | None = None,
    tolerance: float = 1e-3,
    overwrite: bool = False,
    progress: Callable[[str, float, float], None] = lambda what, done, total: None,
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
        tolerance: Largest accepted difference of a logit between the model in memory and the reloaded checkpoint.
        progress: Called with the stage, the work done and all work, in tokens.

    Raises:
        FileExistsError: `out` is there and may not be replaced; nothing has been read yet.
        ValueError: The base has no parts of a known form, no sizes fit the window, or the tasks have no text; the model
            has not been loaded then. Or its weights do not have the sizes that their names imply, or the reloaded
            checkpoint differs from the model in memory; then nothing is written.
    """
    target, opened = check_target(out, overwrite, MANIFEST), Base.open(base, revision=revision)
    reduction.window(Removable(opened.structure.model, opened.place)).check()
    amounts = {"train": reduction.tokens, "validation": reduction.search_tokens, "test": reduction.test_tokens}
    texts = read_texts(tasks, opened.tokenizer(), amounts, reduction.length)
    settings, count = reduction.described(texts), _Work(progress, reduction.stages(texts))
    model: Any = opened.load()
    stored = model.dtype
    # Parameter by parameter: `model.to` would touch the tables of positions too.
    _cast(model, torch.promote_types(stored, torch.float32))
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    removable = Removable(model, opened.place)
    work = json.dumps([opened.fingerprint, settings, [text.tolist() for text in texts.values()], package_versions()])
    with new_directory(target, overwrite, MANIFEST, work) as temporary:
        made = _make(removable, reduction, texts, temporary / _TRIALS, count)
        (temporary / _TRIALS).unlink(missing_ok=True)
        _cast(made.model, stored)
        prompts = fixed_prompts(made.model)
        with quiet():
            made.model.save_pretrained(temporary, max_shard_size="5GB")
            copy_companions(opened.directory, temporary)
            found = check_reloaded(temporary, prompts.cpu(), logits(made.model, prompts).cpu(), tolerance, Rounding())
        done = _described(removable, made, texts["test"].numel(), found)
        members = {
            kind: {str(block): held.tolist() for block, held in getattr(made.kept, kind).items()}
            for kind in ("groups", "channels")
        }
        from_base = {"id": opened.place, "revision": opened.revision, "fingerprint": opened.fingerprint}
        write_manifest(temporary, {"base": from_base, "settings": settings, "kept": members, "found": asdict(done)})
    progress("writing", 1.0, 1.0)
    return done


def _make(removable: Removable, reduction: Reduction, texts: dict[str, Tensor], trials: Path, count: _Work) -> _Made:
    found: dict[str, float] = {}

    def note(name: Written | Literal["magnitude"], measured: Any) -> None:
        found[name] = perplexity(measured, texts["test"])
        count("measuring", _MEASURED if reduction.keep < 1 else 1)

    note("base", removable.model)
    if reduction.keep == 1:
        return _Made(removable.cut(removable.whole()), removable.whole(), "base", found, [], [])
    window = reduction.window(removable)
    ranking = rank(removable, texts["train"], reduction.damping, partial(count, "ranking", removable.blocks))
    kept, searched = _search(window, ranking, reduction, texts["validation"], trials, count)
    if plain := magnitude_removal(window):
        note("magnitude", removable.cut(plain))
    small = removable.cut(kept)
    note("cut", small)
    corrected = partial(count, "correcting", len(kept.blocks))
    if not (layers := reform(removable, kept, small, texts["train"], reduction.damping, corrected)):
        return _Made(small, kept, "cut", found, layers, searched)
    note("reformed", small)
    # Less error of each layer on the training rows can be more perplexity, if there are few of these rows.
    if perplexity(small, texts["validation"]) <= min(searched):
        return _Made(small, kept, "reformed", found, layers, searched)
    return _Made(removable.cut(kept), kept, "cut", found, layers, searched)


def _search(
    window: Window, ranking: Ranking, reduction: Reduction, text: Tensor, trials: Path, count: _Work
) -> tuple[Kept, list[float]]:
    candidates, evaluations = Candidates(window, ranking, reduction.members), reduction.evaluations
    store: Any = JSONLines(trials)

    def measure(genes: Genes) -> float:
        return perplexity(window.removable.cut(candidates.kept(genes)), text)

    def counted(numbers: Sequence[Any]) -> Iterator[Any]:
        for number in numbers:
            yield number
            count("searching", evaluations)

    # A candidate has two or three genes for each block. Few change at once, because most changes of many are worse.
    found = Evolution(evaluations, first=1, mutation=0.05, seed=reduction.seed).search(
        candidates.space, measure, candidates.first(max(1, evaluations // 4)), candidates.within, store, counted
    )
    return candidates.kept(found.best), [value for _, value in found.measured]


def _described(removable: Removable, made: _Made, tokens: int, check: Check) -> Compressed:
    kept = made.kept
    sizes = {
        kind: (len(getattr(kept, kind)[kept.blocks[0]]), getattr(removable, kind)) for kind in ("groups", "channels")
    }
    return Compressed(
        base=removable.parameters,
        parameters=removable.count(len(kept.blocks), sizes["groups"][0], sizes["channels"][0]),
        blocks=kept.blocks,
        all_blocks=removable.blocks,
        sizes=sizes,
        perplexity=made.perplexity,
        written=made.written,
        tokens=tokens,
        layers=made.layers,
        searched=made.searched,
        check=check,
    )


class _Work:
    """Counts work in tokens, and reports it: called with a stage and how many parts it has, one of which is done."""

    def __init__(self, progress: Callable[[str, float, float], None], amounts: dict[str, int]) -> None:
        self._progress, self._amounts = progress, amounts
        self._done, self._total = 0.0, float(sum(amounts.values()))

    def __call__(self, what: str, parts: int) -> None:
        self._done += self._amounts[what] / parts
        self._progress(what, min(self._done, self._total), self._total)


@torch.no_grad()
def _cast(model: Any, dtype: torch.dtype) -> None:
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)


def read_texts(
    tasks: Tasks, tokenizer: PreTrainedTokenizerBase, tokens: dict[str, int], length: int
) -> dict[str, Tensor]:
    """Return token ids `(rows, length)` of each split: inputs and targets one after the other, tasks taking turns.

    Args:
        tokens: By split how many tokens are taken at most; less if there is less text.
        length: Tokens of a row; a text that is shorter makes one shorter row.

    Raises:
        ValueError: A row is bad, or a task has no rows of a split.
    """
    mixture = TaskMixture(tasks, tokenizer)
    mixture.setup()
    loaders: dict[str, Any] = dict(
        zip(SPLITS, (mixture.train_dataloader, mixture.val_dataloader, mixture.test_dataloader), strict=True)
    )
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
def perplexity(model: PreTrainedModel, text: Tensor, rows: int = 4) -> float:
    """Return the exponential of the mean loss of each token of `text` `(rows, tokens)` but a row's first.

    A pass reads `rows` rows.
    """
    losses = []
    for part in text.to(model.device).split(rows):
        logits = model(part, use_cache=False).logits[:, :-1]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses.append(F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="none"))
    return torch.cat(losses).double().mean().exp().item()
