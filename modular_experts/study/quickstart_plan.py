"""Plan the quickstart: the paper's experiment at the size of a laptop.

A base has the skill but answers in another format, twenty experts all learn the same shift of format, and merges keep
more or less of it. All but the base is a study, whose settings `Plan.study` returns.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modular_experts.data.suite import HELD_IN, HELD_OUT, WordTask

MODULES = r".*\.(q|k|v|o|gate|up|down)_proj"


def _kind(
    expert: str, learning_rate: float, callbacks: Sequence[dict[str, Any]] = (), **settings: Any
) -> dict[str, Any]:
    """Return the settings of `fit` for a kind of expert, at a rate at which both the experts and their merges are good.

    The default AdamW is fused and rounds otherwise; this one keeps the published numbers to the bit.
    """
    adam = {"class_path": "torch.optim.AdamW", "init_args": {"lr": learning_rate, "weight_decay": 0.0}}
    return {
        "expert": {"class_path": expert, "init_args": settings},
        "model": {"optimizer": adam},
        "trainer": {"callbacks": [*callbacks]},
    }


_ONCE = [{"class_path": "MaskSchedule", "init_args": {"batches": 1}}]
KINDS = {
    "sparse": _kind("SparseExpert", 1e-3, _ONCE, keep_ratio=0.1),
    "block": _kind("SparseExpert", 1e-3, _ONCE, keep_ratio=0.1, granularity="block", block_size=8),
    "lora": _kind("LoRAExpert", 3e-3, rank=4, alpha=8.0),
    "full": _kind("FullExpert", 1e-3),
}
SPARSE = ("sparse", "block")

# Each method, and the scales to try on validation words beside its default scale 1.
METHODS = {
    "Average": (1.0, 1.5, 2.0, 3.0, 4.0),
    "TaskArithmetic": (0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1.0),
    "SparseAverage": (0.35, 0.5, 0.75, 1.0, 1.4),
    "TIES": (0.35, 0.5, 0.75, 1.0, 1.4),
}
MULTITASK_BATCH, EVAL_BATCH = 64, 448
NEW_TOKENS = 10  # more than any answer has


@dataclass(frozen=True)
class Plan:
    """The sizes of a run; the defaults make the quickstart."""

    seed: int = 0  # of words, weights and orders
    tasks: int = len(HELD_IN)  # held-in tasks, from 2 to 20
    hidden: int = 96  # width of the base; its feed-forward layers are three times as wide
    base_rows: int = 1000  # training rows of each task in each of the two formats
    base_target: float = 0.6  # exact match on validation words at which the base's learning rate begins to fall
    base_limit: int = 2500  # the most steps before that
    base_decay: int = 250  # steps until the learning rate is zero
    expert_steps: int = 50  # optimizer steps of an expert
    batch_size: int = 16  # rows of an expert's batch
    validation_rows: int = 16  # words of each task on which scales are chosen
    test_rows: int = 48  # test words of each task
    kinds: tuple[str, ...] = tuple(KINDS)

    def __post_init__(self) -> None:
        if not 2 <= self.tasks <= len(HELD_IN):
            raise ValueError(f"tasks={self.tasks} must be from 2 to {len(HELD_IN)}; a merge needs two experts")

    @property
    def held_in(self) -> dict[str, type[WordTask]]:
        """The tasks that get experts, by name."""
        return {task.name(): task for task in HELD_IN[: self.tasks]}

    @property
    def held_out(self) -> dict[str, type[WordTask]]:
        """The tasks that are tested without an expert, by name."""
        return {task.name(): task for task in HELD_OUT}

    @property
    def levels(self) -> list[int]:
        """How many experts go into one merge: a few, more, all."""
        return [count for count in (2, 5, 10) if count < self.tasks] + [self.tasks]

    def words(self, chatty: bool = False) -> dict[str, Any]:
        """Return the settings of the words of every task on which experts are trained and tested."""
        counts = {"train": self.expert_steps * self.batch_size, "validation": self.validation_rows}
        return {"seed": self.seed, **counts, "test": self.test_rows, "chatty": chatty}

    def study(self, base: Path) -> dict[str, Any]:
        """Return the settings of the study that does this plan on a trained base, as `read_study` takes them."""
        tasks = {
            role: [
                {"name": name, "source": {"class_path": task.__name__, "init_args": self.words()}}
                for name, task in found.items()
            ]
            for role, found in (("held_in", self.held_in), ("held_out", self.held_out))
        }
        merges: list[dict[str, Any]] = []
        for method, scales in METHODS.items():
            # For experts that move every entry, the overlap-aware average equals the plain one.
            kinds = [kind for kind in self.kinds if kind in SPARSE or method != "SparseAverage"]
            # Fix the exponent at 1: otherwise a tuning would choose it as well.
            fixed = {"exponent": [1.0]} if method == "SparseAverage" else {}
            grid = {"scale": [*scales], **fixed}
            chosen = {"tune": {"grid": grid}, "rows": self.validation_rows, "name": method}
            merges += [{"method": method, "name": untuned(method), "kinds": kinds}] * bool(kinds)
            merges += [{"method": method, **chosen, "kinds": kinds}] * bool(kinds)
        # As many rows as the experts of a kind together.
        steps = max(1, self.tasks * self.expert_steps * self.batch_size // MULTITASK_BATCH)
        return {
            "base": str(base),
            "tasks": tasks,
            "fit": {
                "modules": MODULES,
                "steps": self.expert_steps,
                "batch_size": self.batch_size,
                # Packed rows have the same losses but for rounding; padded ones keep the published numbers to the last
                # digit.
                "data": {"packing": False},
                "trainer": {"limit_val_batches": 0, "gradient_clip_val": 1.0, "accelerator": "cpu"},
            },
            "experts": {kind: KINDS[kind] for kind in self.kinds},
            "merges": merges,
            "counts": self.levels,
            "multitask": {**KINDS["full"], "batch_size": MULTITASK_BATCH, "steps": steps},
            "seeds": [self.seed],
            "data": {"eval_batch_size": EVAL_BATCH},
            "max_new_tokens": NEW_TOKENS,
        }


def untuned(method: str) -> str:
    """Return the name of a merge at the scale with which its method comes, 1, beside that at the chosen scale."""
    return f"{method} at 1"
