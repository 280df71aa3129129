"""Make a smaller base: search which blocks, heads and MLP channels stay, correct what reads them, and write the rest.

The paper is Search for efficient LLMs (arXiv 2409.17372). Candidates are measured by their perplexity as they are cut;
only the best is corrected, and no weight is trained.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from modular_experts.base import Base
from modular_experts.base.files import MANIFEST, copy_companions, write_manifest
from modular_experts.base.loading import quiet
from modular_experts.base.streaming import Rounding
from modular_experts.base.verify import Check, check_reloaded, fixed_prompts, logits
from modular_experts.data.tasks import Tasks
from modular_experts.jobs import JSONLines
from modular_experts.library import check_target, new_directory
from modular_experts.library.record import package_versions
from modular_experts.systems.compress.ranking import Ranking, best, magnitudes, rank
from modular_experts.systems.compress.reform import LayerError, reform
from modular_experts.systems.compress.removable import Kept, Kind, Removable
from modular_experts.systems.compress.text import perplexity, read_texts
from modular_experts.tuning.evolution import Choice, Evolution, Gene, Genes, Mask, Whole

Members = Literal["importance", "windows", "masks"]
Written = Literal["base", "cut", "reformed"]
WINDOWS = 8
"""A window of what stays starts after 0, 1, ... or all 8 eighths of the members that are removed."""
_TRIALS = "search.jsonl"


@dataclass(frozen=True)
class Compressed:
    """What `compress` found and wrote.

    Attributes:
        base: Parameters of the base.
        parameters: Parameters of the checkpoint.
        blocks: Numbers of the base's blocks that stay.
        all_blocks: How many blocks the base has.
        sizes: How many `groups` of heads (1 of 1 if they cannot be removed) and how many `channels` of its MLP a block
            keeps, and of how many.
        perplexity: On the test rows, of the `base`, of what is left by removal of the parts with the smallest weights
            in all blocks (`magnitude`, as in `magnitude_removal`; absent if it finds none), of what the search found
            (`cut`), and of that after its layers were corrected (`reformed`; absent if whole blocks are all that it
            lost). A copy of the base has only that of the `base`.
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
class Window:
    """The numbers of parameters that a smaller model may have, and the sizes that fit."""

    removable: Removable
    keep: float
    slack: float
    multiple: int

    def channels(self, blocks: int, groups: int) -> int | None:
        """Return the most MLP channels beside these blocks and groups, or None if the window has no room for them."""
        most, least = (share * self.removable.parameters for share in (self.keep, self.keep - self.slack))
        width = self.removable.widest(blocks, groups, int(most), self.multiple) if blocks else 0
        return width if width and self.removable.count(blocks, groups, width) >= least else None

    def check(self) -> None:
        """Raise ValueError, with the nearest keep ratio that works, if nothing fits."""
        sizes = [(b, g) for b in range(1, self.removable.blocks + 1) for g in range(1, self.removable.groups + 1)]
        if any(self.channels(*size) for size in sizes):
            return
        known = self.removable
        steps = [*range(self.multiple, known.channels, self.multiple), known.channels]
        shares = [known.count(*size, width) / known.parameters for size in sizes for width in steps]
        near = min(shares, key=lambda share: abs(share - self.keep))
        raise ValueError(
            f"keep={self.keep} and slack={self.slack}: nothing that can be removed of {known.place} leaves between "
            f"{max(0, self.keep - self.slack):.2%} and {self.keep:.2%} of its {known.parameters:,} parameters; the "
            f"nearest is keep={near + 5e-5:.4f}"
        )


def compress(
    base: str | Path | Base,
    tasks: Tasks,
    out: str | Path,
    keep: float,
    slack: float = 0.02,
    evaluations: int = 48,
    members: Members = "importance",
    multiple: int = 8,
    damping: float = 0.01,
    tokens: int = 8192,
    search_tokens: int = 1024,
    test_tokens: int = 4096,
    length: int = 256,
    seed: int = 0,
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
        out: Directory of the checkpoint.
        keep: The most parameters, as a share of the base's, in (0, 1]; 1 copies the base.
        slack: The fewest parameters are `keep - slack` of them.
        evaluations: Candidates that the search measures.
        members: `importance` lets the search choose for each block between two rankings of what it can lose;
            `windows` lets it choose where a contiguous stretch starts, as the released code does; `masks` starts from
            the members with the best of the paper's scores (`Ranking.entrywise`) and lets it exchange some of them, as
            the paper's text does.
        multiple: The number of channels that an MLP keeps is a multiple of this, unless it keeps all of them, because
            GPUs multiply such matrices faster.
        damping: Strength of the pull of corrected weights to what they were, as a share of the mean squared input.
        tokens: Tokens of training rows that rank and correct. Take several times the width of an MLP.
        search_tokens: Tokens of validation rows that measure a candidate.
        test_tokens: Tokens of test rows for the closing measurement.
        length: Tokens of a pass.
        seed: Seed of the search. Equal seeds find equal models.
        revision: Branch, tag or commit of a hub id.
        tolerance: Largest accepted difference of a logit between the model in memory and the reloaded checkpoint.
        overwrite: Replace a checkpoint of ours that is there.
        progress: Called with what is going on, the work done and all work, in tokens.

    Raises:
        FileExistsError: `out` is there and may not be replaced; nothing has been read yet.
        ValueError: A setting is out of its range, the base has no parts of a known form, no sizes fit the window, or
            the tasks have no text; the model has not been loaded then. Or its weights do not have the sizes that their
            names imply, or the reloaded checkpoint differs from the model in memory; then nothing is written.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep={keep} must be in (0, 1], the share of the parameters that stay, such as 0.8")
    if not 0 < slack < 1:
        raise ValueError(f"slack={slack} must be in (0, 1), such as 0.02")
    if not 0 < damping < math.inf:
        raise ValueError(f"damping={damping} must be a positive number, such as 0.01")
    if members not in get_args(Members):
        raise ValueError(f"members={members!r} must be one of {', '.join(map(repr, get_args(Members)))}")
    counts = {"evaluations": evaluations, "multiple": multiple, "tokens": tokens, "search_tokens": search_tokens}
    for name, value in (counts | {"test_tokens": test_tokens, "length": length}).items():
        if value < (least := 2 if "token" in name or name == "length" else 1):
            raise ValueError(f"{name}={value} must be at least {least}")
    target, opened = check_target(out, overwrite, MANIFEST), Base.open(base, revision=revision)
    described = Removable(opened.structure.model, opened.place)
    Window(described, keep, slack, multiple).check()
    amounts = {"train": tokens, "validation": search_tokens, "test": test_tokens}
    texts = read_texts(tasks, opened.tokenizer(), amounts, length)

    settings = {"keep": keep, "slack": slack, "evaluations": evaluations, "members": members, "multiple": multiple}
    settings |= {"damping": damping, "seed": seed, "length": length}
    settings |= {f"{split}_tokens": text.numel() for split, text in texts.items()}
    model: Any = opened.load()
    stored = model.dtype
    # Parameter by parameter: `model.to` would touch the tables of positions too.
    _cast(model, torch.promote_types(stored, torch.float32))
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    removable = Removable(model, opened.place)
    window = Window(removable, keep, slack, multiple)
    models = 4 if keep < 1 else 1
    stages = {"measuring": models * texts["test"].numel()}
    if keep < 1:
        stages["ranking"] = 2 * texts["train"].numel()
        stages["searching"] = evaluations * texts["validation"].numel()
        stages["correcting"] = 3 * texts["train"].numel()
    count = _Work(progress, stages)
    work = json.dumps([opened.fingerprint, settings, [text.tolist() for text in texts.values()], package_versions()])
    with new_directory(target, overwrite, MANIFEST, work) as temporary:
        found: dict[str, float] = {}
        written: Written = "base"
        kept, searched, layers = removable.whole(), list[float](), list[LayerError]()

        def note(name: Written | Literal["magnitude"], measured: Any) -> None:
            found[name] = perplexity(measured, texts["test"])
            count("measuring", models)

        note("base", model)
        if keep < 1:
            ranking = rank(removable, texts["train"], damping, partial(count, "ranking", removable.blocks))
            trials: Any = JSONLines(temporary / _TRIALS)
            kept, searched = _search(window, ranking, members, evaluations, seed, texts["validation"], trials, count)
            if plain := magnitude_removal(window):
                note("magnitude", removable.cut(plain))
        small = removable.cut(kept)
        if keep < 1:
            written = "cut"
            note("cut", small)
            corrected = partial(count, "correcting", len(kept.blocks))
            if layers := reform(removable, kept, small, texts["train"], damping, corrected):
                note("reformed", small)
                # Less error of each layer on the training rows can be more perplexity, if there are few of these rows.
                if perplexity(small, texts["validation"]) <= min(searched):
                    written = "reformed"
                else:
                    small = removable.cut(kept)
        (temporary / _TRIALS).unlink(missing_ok=True)
        _cast(small, stored)
        prompts = fixed_prompts(small)
        with quiet():
            small.save_pretrained(temporary, max_shard_size="5GB")
            copy_companions(opened.directory, temporary)
            check = check_reloaded(temporary, prompts.cpu(), logits(small, prompts).cpu(), tolerance, Rounding())
        sizes = {
            kind: (len(getattr(kept, kind)[kept.blocks[0]]), getattr(removable, kind))
            for kind in ("groups", "channels")
        }
        parameters = removable.count(len(kept.blocks), sizes["groups"][0], sizes["channels"][0])
        done = Compressed(
            removable.parameters,
            parameters,
            kept.blocks,
            removable.blocks,
            sizes,
            found,
            written,
            texts["test"].numel(),
            layers,
            searched,
            check,
        )
        from_base = {"id": opened.place, "revision": opened.revision, "fingerprint": opened.fingerprint}
        members_kept = {
            kind: {str(block): held.tolist() for block, held in getattr(kept, kind).items()}
            for kind in ("groups", "channels")
        }
        write_manifest(
            temporary, {"base": from_base, "settings": settings, "kept": members_kept, "found": asdict(done)}
        )
    progress("writing", 1.0, 1.0)
    return done


def _search(
    window: Window,
    ranking: Ranking,
    members: Members,
    evaluations: int,
    seed: int,
    text: Tensor,
    store: MutableMapping[Genes, float],
    count: _Work,
) -> tuple[Kept, list[float]]:
    """Return the best candidate, and the perplexity of all in order.

    A candidate has a gene for each block that tells whether it stays, one for the number of groups, and for each block
    one that tells which of its groups and channels stay, or a mask of each. The channels are as many as the window has
    room for. A mask of another size than a candidate's loses its members with the lowest scores, or gets the best of
    the others; so one that holds all stands for the best.
    """
    removable, depth = window.removable, window.removable.blocks
    rankings = [ranking.contribution, ranking.compensated]
    totals = {kind: int(getattr(removable, kind)) for kind in removable.readers}
    modes: dict[Members, tuple[list[Gene], Genes]] = {
        "importance": ([Choice(len(rankings))], (0,)),
        "windows": ([Whole(0, WINDOWS)], (0,)),
        "masks": ([Mask(total) for total in totals.values()], tuple("1" * total for total in totals.values())),
    }
    own, first = modes[members]
    space: list[Gene] = [*[Choice(2)] * depth, Whole(1, removable.groups), *own * depth]

    def of_block(genes: Genes, block: int) -> Genes:
        start = depth + 1 + block * len(own)
        return genes[start : start + len(own)]

    def sizes(genes: Genes) -> tuple[tuple[int, ...], int, int | None]:
        blocks = tuple(block for block in range(depth) if genes[block])
        return blocks, int(genes[depth]), window.channels(len(blocks), int(genes[depth]))

    def within(genes: Genes) -> Genes | None:
        if not sizes(genes)[2]:
            return None
        # What a block that is removed would keep changes nothing, so it is that of the start.
        chosen = [of_block(genes, block) if genes[block] else first for block in range(depth)]
        if members == "masks":
            held = kept(genes)
            for block in held.blocks:
                chosen[block] = tuple(_signs(getattr(held, kind)[block], total) for kind, total in totals.items())
        return (*genes[: depth + 1], *chain.from_iterable(chosen))

    def kept(genes: Genes) -> Kept:
        blocks, groups, channels = sizes(genes)
        assert channels is not None

        def scores(block: int, kind: Kind) -> Tensor:
            if members == "masks":
                signs = str(dict(zip(totals, of_block(genes, block), strict=True))[kind])
                first_those_in = torch.tensor([int(sign) * len(signs) for sign in signs])
                return ranking.entrywise[kind][block].argsort().argsort() + first_those_in
            (gene,) = map(int, of_block(genes, block))
            if members == "importance":
                return rankings[gene][kind][block]
            total, held = totals[kind], {"groups": groups, "channels": channels}[kind]
            start = (total - held) * gene // WINDOWS
            return torch.zeros(total).index_fill_(0, torch.arange(start, start + held), 1.0)

        return best(removable, blocks, groups, channels, scores)

    def measure(genes: Genes) -> float:
        return perplexity(removable.cut(kept(genes)), text)

    def counted(numbers: Sequence[Any]) -> Iterator[Any]:
        for number in numbers:
            yield number
            count("searching", evaluations)

    # The search starts from candidates that lack no block, one block, and so on. The block that turns the hidden states
    # least goes first.
    falling = sorted(range(depth), key=lambda block: ranking.blocks[block])
    start = [
        (*[int(block not in falling[:gone]) for block in range(depth)], groups, *first * depth)
        for groups in range(removable.groups, 0, -1)
        for gone in range(depth)
    ]
    fitting = [genes for genes in start if sizes(genes)[2]][: max(1, evaluations // 4)]
    # A candidate has two or three genes for each block. Few change at once, because most changes of many are worse.
    found = Evolution(evaluations, first=1, mutation=0.05, seed=seed).search(
        space, measure, fitting, within, store, counted
    )
    return kept(found.best), [value for _, value in found.measured]


def _signs(members: Tensor, total: int) -> str:
    """Return the mask of these members, as `Mask` writes it."""
    return "".join(map(str, torch.zeros(total, dtype=torch.int64).index_fill_(0, members, 1).tolist()))


def magnitude_removal(window: Window) -> Kept | None:
    """Return what stays if every block loses the MLP channels with the smallest weights.

    Where channels alone are not enough, the groups of heads with the smallest weights go too. If these are not enough
    either, the result is None, because blocks are not removed here.
    """
    removable, scores = window.removable, magnitudes(window.removable)
    for groups in range(removable.groups, 0, -1):
        if channels := window.channels(removable.blocks, groups):
            return best(
                removable, tuple(range(removable.blocks)), groups, channels, lambda block, kind: scores[kind][block]
            )
    return None


class _Work:
    """Counts work in tokens, and reports it."""

    def __init__(self, progress: Callable[[str, float, float], None], amounts: dict[str, int]) -> None:
        self._progress, self._amounts = progress, amounts
        self._done, self._total = 0.0, float(sum(amounts.values()))

    def __call__(self, what: str, parts: int) -> None:
        """Note that one of so many parts of a stage is done."""
        self._done += self._amounts[what] / parts
        self._progress(what, min(self._done, self._total), self._total)


@torch.no_grad()
def _cast(model: Any, dtype: torch.dtype) -> None:
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)
