"""Do the pieces of work of the quickstart: train one expert, or measure one kind of merge.

A piece leaves its expert in the library and returns its entry of `results.json`. Pieces run in processes of their own,
in any order: the same seed gives the same numbers, whatever ran before in the process.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from statistics import fmean
from typing import Any

from lightning.pytorch import Trainer, seed_everything
from torch.optim import AdamW
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modular_experts.base import Base
from modular_experts.base.apply import applied
from modular_experts.callbacks import ExportExpert, MaskSchedule
from modular_experts.data import Task, TaskMixture
from modular_experts.evaluation import measure
from modular_experts.library import StoredExpert, open_expert
from modular_experts.library.expert import DELTA_FILE
from modular_experts.merger.merged import merge
from modular_experts.quickstart.base import TRAINER
from modular_experts.quickstart.plan import KINDS, METHODS, MODULES, Plan
from modular_experts.quickstart.rows import SCORES
from modular_experts.suite import WordTask
from modular_experts.training.module import ExpertModule

NEW_TOKENS = 10  # more than any answer has
EVAL_BATCH = 448
EXAMPLES = 2  # test words of each task whose answers are kept
MULTITASK_BATCH = 64


def measure_base(plan: Plan, out: Path) -> dict[str, Any]:
    """Test the base as it is, and in its own chatty format, which shows the skill that it has."""
    data = partial(_mixture, plan, out, list(plan.held_in), held_out=True)
    plain, latent = _scores(out, data()), _scores(out, data(chatty=True), tokens=20)
    return {"plain": _roles(plain), "latent": _roles(latent), **_by_task(plain)}


def train_expert(plan: Plan, out: Path, kind: str, task: str) -> dict[str, Any]:
    """Train one expert, put it into the library, and test it on its task."""
    facts, scores = _train(plan, out, _mixture(plan, out, [task]), kind, f"{kind}-{task}", plan.expert_steps)
    answers = {"answers": scores["examples"][task]}
    return {name: scores["tasks"][task][name] for name in (*SCORES, "rows")} | facts | answers


def train_multitask(plan: Plan, out: Path) -> dict[str, Any]:
    """Train all weights on the mixture of the held-in tasks, on as many rows as the experts of a kind together."""
    data = _mixture(plan, out, list(plan.held_in), held_out=True, batch_size=MULTITASK_BATCH)
    steps = max(1, plan.tasks * plan.expert_steps * plan.batch_size // MULTITASK_BATCH)
    facts, scores = _train(plan, out, data, "full", "multitask", steps)
    return {**_roles(scores), **facts, **_by_task(scores), "steps": steps}


def measure_merge(plan: Plan, out: Path, kind: str, method: str, count: int) -> dict[str, Any]:
    """Merge each group of `count` experts, choose a scale on validation words, and test at that scale and at scale 1.

    All groups share the chosen scale. The methods are linear in their scale, so one merge at scale 1 serves every
    scale, in place on the loaded base. The merge of all experts goes into the library at the chosen scale.
    """
    make, scales = METHODS[method]
    groups, everything = plan.groups(count), count == plan.tasks
    members = [[out / "library" / f"{kind}-{task}" for task in group] for group in groups]
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        merges = [merge(paths, make(), Path(folder, f"group-{number}")) for number, paths in enumerate(members)]
        seconds = (time.perf_counter() - started) / len(groups)
        parts = [
            (_mixture(plan, out, group, held_out=everything), one) for group, one in zip(groups, merges, strict=True)
        ]
        losses = {
            scale: fmean(_scores(out, *part, scale, None)["held_in"]["loss"] for part in parts) for scale in scales
        }
        scale = min(losses, key=losses.__getitem__)
        found = {
            "subsets": len(groups),
            "scale": scale,
            "scales": {str(tried): {"loss": loss} for tried, loss in losses.items()},
            "default": _roles(*[_scores(out, data, merged) for data, merged in parts]),
            "seconds": seconds,
        }
        if not everything:
            return found | {"chosen": _roles(*[_scores(out, data, merged, scale) for data, merged in parts])}
        target = out / "library" / f"merge-{kind}-{method}"
        stored = merge(members[0], make(scale=scale), target, overwrite=True)
        tested = _scores(out, parts[0][0], stored)
    found |= {"chosen": _roles(tested), **_by_task(tested)}
    return found | {"name": stored.name, "bytes": _bytes(stored), "kept": stored.kept_share}


def _train(
    plan: Plan, out: Path, data: TaskMixture, kind: str, name: str, steps: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what the training cost, and the scores of the trained model."""
    seed_everything(plan.seed, verbose=False)
    optimizer = partial(AdamW, lr=KINDS[kind].learning_rate, weight_decay=0.0)
    module = ExpertModule(str(out / "base"), modules=MODULES, expert=KINDS[kind].expert, optimizer=optimizer)
    selection = [MaskSchedule(batches=1)] if KINDS[kind].sparse else []
    started = time.perf_counter()
    trainer = Trainer(
        max_steps=steps,
        limit_val_batches=0,
        callbacks=[ExportExpert(str(out / "library"), name, overwrite=True, monitor=None), *selection],
        default_root_dir=out,
        **TRAINER,
    )
    trainer.fit(module, data)
    seconds = time.perf_counter() - started
    stored = open_expert(out / "library" / name)
    shares = {share: stored.record["hyperparameters"].get(share, 1.0) for share in ("kept", "ever_trained")}
    trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    facts = {"name": name, "seconds": seconds, "bytes": _bytes(stored), "parameters": trained, **shares}
    data.setup("test")
    scores = measure(module.model, module.tokenizer, data.test_dataloader(), data.roles, NEW_TOKENS, examples=EXAMPLES)
    return facts, scores


def _scores(
    out: Path,
    data: TaskMixture,
    expert: StoredExpert | None = None,
    scale: float = 1.0,
    tokens: int | None = NEW_TOKENS,
) -> dict[str, Any]:
    """Return the test scores of the base with an expert or without; without new tokens, its losses in validation."""
    model, tokenizer = _base(out)
    data.setup("test" if tokens else "validate")
    batches = data.test_dataloader() if tokens else data.val_dataloader()
    with applied(model, [expert] if expert else [], scale, check=False):
        return measure(model, tokenizer, batches, data.roles, tokens, examples=EXAMPLES)


def _mixture(
    plan: Plan, out: Path, names: Sequence[str], held_out: bool = False, chatty: bool = False, batch_size: int = 0
) -> TaskMixture:
    """Return the words of held-in tasks, and of the held-out ones if wanted."""
    chosen: list[tuple[str, type[WordTask], Any]] = [(name, plan.held_in[name], "held_in") for name in names]
    if held_out:
        chosen += [(name, task, "held_out") for name, task in plan.held_out.items()]
    rows = plan.expert_steps * plan.batch_size, plan.validation_rows, plan.test_rows
    tasks = [Task(name, source=task(plan.seed, *rows, chatty), role=role) for name, task, role in chosen]
    # Packed rows have the same losses but for rounding; padded ones keep the published numbers to the last digit.
    size = batch_size or plan.batch_size
    return TaskMixture(tasks, _base(out)[1], size, EVAL_BATCH, seed=plan.seed, packing=False)


@cache
def _base(out: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    base = Base.open(out / "base")
    return base.load(), base.tokenizer()


def _roles(*groups: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return the scores of each role that was tested, as means over groups of equally many tasks."""
    roles = [role for role in ("held_in", "held_out") if groups[0][role]]
    return {role: {name: fmean(group[role][name] for group in groups) for name in SCORES} for role in roles}


def _by_task(scores: Mapping[str, Any]) -> dict[str, Any]:
    """Return each task's exact match, and the answers to its first test words."""
    return {
        "exact_match": {task: found["exact_match"] for task, found in scores["tasks"].items()},
        "answers": scores["examples"],
    }


def _bytes(expert: StoredExpert) -> int:
    """Return the size of the deltas; the record beside them holds paths, whose lengths depend on the machine."""
    return (expert.path / DELTA_FILE).stat().st_size
