"""One training run, of one process or as a rank of several, and shorter ones without validation.

Each rank writes what it ends with to `FOLDER/rank{R}.pt`. Two ranks also resume from a checkpoint in mid-epoch.
"""

import warnings
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from testbed import runs, trained_mixtures
from testbed.shared_gate import SharedGate
from testbed.systems import of, there
from testbed.trained_mixtures import of_config
from torch.nn.parallel import DistributedDataParallel

from modular_experts.data import Task, TaskMixture
from modular_experts.data.batch import IGNORED
from modular_experts.experts import MaskedExpert, SparseExpert
from modular_experts.experts.selectable import Selectable
from modular_experts.experts.site import LayerPlan
from modular_experts.injection import expert_layers, expert_state
from modular_experts.library import open_expert, write_expert
from modular_experts.masks import ConnectionSensitivity, FisherInformation, GradientMagnitude, GrowAndDrop, Reselect
from modular_experts.selection.mask_schedule import MaskSchedule
from modular_experts.training.export_expert import ExportExpert
from modular_experts.training.log_progress import LogProgress
from modular_experts.training.module import ExpertModule
from modular_experts.training.train_under_others import TrainUnderOthers

FEW_ROWS = {"molora": 1, "point-lora": 2}
"""A mixture with a penalty that counts tokens, and one that counts rows, with the batches of a step."""

ALONE = ("goat", "lora-ir")
"""A mixture that balances the use of its experts, and one whose router reads prompts."""

PLANS: dict[str, LayerPlan] = {"shared gate": SharedGate()}

STEPS = [(1, 1024), (2, 0)]
"""Micro-batches of steps that choose supports, and the memory for their sums."""


SYSTEMS = there(
    {
        "adamix": lambda: (of("ada_mix.AdaMixExpert", copies=3), []),
        "boosting": lambda: (of("boosting.BoostedLoRAExpert"), [of("boosting.callback.Boosting", every=2, share=0.5)]),
    }
)
"""Types and the callbacks that they need."""


class Watch(Callback):
    """Keeps the logged loss and the supports after each step, and what DDP reduces and sends."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.supports: list[dict[str, list[int]]] = []
        self.reduced_bytes = self.synchronised_buffers = 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.losses.append(float(trainer.callback_metrics["loss"]))
        layers = [
            (name, layer) for name, layer in expert_layers(pl_module.model) if isinstance(layer.expert, Selectable)
        ]
        self.supports.append({name: layer.expert.support_units().tolist() for name, layer in layers})
        wrapped = trainer.strategy.model
        if isinstance(wrapped, DistributedDataParallel):
            self.reduced_bytes = wrapped._get_ddp_logging_data()["total_parameter_size_bytes"]
            self.synchronised_buffers = len(wrapped.modules_buffers)


Trained = tuple[ExpertModule, Trainer, Watch]


def train(folder: Path, base: Path, files: dict[str, Path], ranks: int, *callbacks: Callback, **how: Any) -> Trained:
    """Train a few steps, by default in float64; return the module, its trainer, and the watch over both.

    Args:
        how: `seed` of the start and `steps`; `optimizer`; `expert` in half of the layers, or all that an `ExpertModule`
            takes as `model`; `data`, if it is not the mixture of all files; and settings of the trainer.
    """
    seed_everything(how.pop("seed", 0), verbose=False)
    watch, model = Watch(), how.pop("model", {})
    model = {"dtype": "float64", "optimizer": how.pop("optimizer", partial(torch.optim.SGD, lr=0.5))} | model
    expert = how.pop("expert", None)
    module = runs.module(base, expert, **model) if expert else ExpertModule(str(base), **model)
    data = how.pop("data", None) or runs.mixture(files, base, seed=0)
    place = {"devices": ranks, "strategy": "ddp" if ranks > 1 else "auto", "max_steps": how.pop("steps", 4)}
    trainer = runs.trainer(folder, watch, *callbacks, limit_val_batches=0, **(place | how))
    trainer.fit(module, data)
    return module, trainer, watch


SPARSE, MOMENTUM = partial(SparseExpert, keep_ratio=0.1), partial(torch.optim.SGD, lr=0.5, momentum=0.9)


def choose_in_steps(folder: Path, base: Path, files: dict[str, Path], ranks: int, parts: int, mib: int) -> dict:
    """Train a few steps that choose supports within; return supports after each, and values."""
    rule = GrowAndDrop(every=1, until=1.0, replace=0.4)
    schedule = MaskSchedule(rule=rule, batches="step", seed=0, accumulator_mib=mib)
    how = {"expert": SPARSE, "optimizer": MOMENTUM, "seed": ranks, "accumulate_grad_batches": parts}
    module, _, watch = train(folder, base, files, ranks, schedule, **how)
    # Before the first step's end the supports are random.
    return {"supports": watch.supports[parts - 1 :], "values": values(module)}


def choose_for_matrices(folder: Path, base: Path, files: dict[str, Path]) -> None:
    """Choose entries of a mixture's matrices within steps of one row a rank, which reaches few of them."""
    warnings.simplefilter("ignore")
    found = {}
    rule, sizes = GrowAndDrop(every=2, until=1.0, replace=0.4), [*STEPS, (2, 1024)]
    ways = [(parts, MaskSchedule(rule=rule, seed=0, accumulator_mib=mib)) for parts, mib in sizes]
    ways += [(1, MaskSchedule(score, rule, batches=2, seed=0)) for score in (GradientMagnitude(), FisherInformation())]
    for number, (parts, schedule) in enumerate(ways):
        how = {"optimizer": MOMENTUM, "accumulate_grad_batches": parts, "strategy": "ddp_find_unused_parameters_true"}
        how |= {"data": runs.mixture(files, base, batch_size=2, seed=0), "steps": 5}
        model = {"expert": SPARSE, "modules": r".*experts\.down_proj\[\d+\]", "gradient_checkpointing": False}
        module, trainer, watch = train(folder, base, files, 2, schedule, model=model, **how)
        found[number] = {"supports": watch.supports, "values": values(module)}
    torch.save(found, folder / f"rank{trainer.global_rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def train_masked(folder: Path, base: Path, files: dict[str, Path], ranks: int) -> dict:
    """Train the paper's algorithm for a few steps; return the masks after each, and all trained values."""
    schedule = MaskSchedule(ConnectionSensitivity(), Reselect(every=2), seed=0)
    how = {"expert": partial(MaskedExpert, keep_ratio=0.1), "seed": ranks, "steps": 6}
    module, _, watch = train(folder, base, files, ranks, schedule, **how)
    return {"supports": watch.supports, "values": trained(module)}


def train_few_rows(folder: Path, base: Path, files: dict[str, Path], ranks: int, mixture: str) -> dict:
    """Train two epochs of five rows in batches of four, so that one of two ranks has no row in every second batch.

    The mixture's penalty counts tokens or rows. Return the logged losses, the rows trained on, all trained values, and
    the mean over ranks of the loss of a batch with one labelled token, which rank 0 has.
    """
    progress, data = LogProgress(), TaskMixture([Task("upper", str(files["upper"]), cap=5)], str(base), 4, seed=0)
    how = {"steps": 4 // FEW_ROWS[mixture], "accumulate_grad_batches": FEW_ROWS[mixture]}
    module, trainer, watch = train(folder, base, files, ranks, progress, model=of_config(mixture), data=data, **how)
    found = {"losses": watch.losses, "rows": progress.rows, "values": trained(module)}
    batch = next(iter(data.train_dataloader()))
    row, place = (batch["labels"] != IGNORED).nonzero()[0]
    alone = torch.full_like(batch["labels"], IGNORED)
    if trainer.global_rank == 0:
        alone[row, place] = batch["labels"][row, place]
    loss = module.eval().loss(batch | {"labels": alone}).detach()
    return found | {"one token": float(trainer.strategy.reduce(loss, reduce_op="mean"))}


def train_under_others(folder: Path, base: Path, files: dict[str, Path], ranks: int, rank: int) -> dict:
    """Train a few steps under one of two others: the expert that was just exported, and minus half of it."""
    mine, others = open_expert(folder / "library" / "mine"), folder / f"others{rank}"
    for name, scale in {"whole": 1.0, "half": -0.5}.items():
        write_expert(others / name, {weight: mine[weight] * scale for weight in mine}, mine.record)
    under, data = TrainUnderOthers(str(others), count=1, scale=1.0), runs.mixture({"new": files["upper"]}, base, seed=0)
    return values(train(folder, base, files, ranks, under, expert=SPARSE, data=data)[0])


def train_system(folder: Path, base: Path, files: dict[str, Path], ranks: int, name: str) -> dict:
    """Train a few steps of a type that draws at random, or starts anew; return what it trained."""
    expert, callbacks = SYSTEMS[name]
    module, *_ = train(folder, base, files, ranks, *[make() for make in callbacks], expert=expert, steps=5)
    return {key: tensor for key, tensor in module.state_dict().items() if ".expert." in key}


def trained(module: ExpertModule) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in module.named_parameters() if parameter.requires_grad}


def values(module: ExpertModule) -> dict[str, torch.Tensor]:
    return {name: layer.expert.values.detach() for name, layer in expert_layers(module.model)}


def prepare(folder: Path, base: Path, ranks: int, *callbacks: Callback, **settings) -> tuple:
    """Return a module and a trainer for seven steps (an epoch is six); the support changes at two of them."""
    seed_everything(ranks, verbose=False)  # other supports at first in one process and in two: the schedule must agree
    schedule = MaskSchedule(rule=GrowAndDrop(every=3, until=0.9, replace=0.4), batches=2, seed=0)
    module = runs.module(base, SPARSE, dtype="float64", optimizer=MOMENTUM)
    place = {"devices": ranks, "strategy": "ddp" if ranks > 1 else "auto", "enable_checkpointing": True}
    trainer = runs.trainer(folder, schedule, *callbacks, max_steps=7, **(place | settings))
    return module, trainer


def main(folder: Path, base: Path, files: dict[str, Path], ranks: int) -> None:
    warnings.simplefilter("ignore")
    watch, export = Watch(), ExportExpert(str(folder / "library"), "mine")
    saving = ModelCheckpoint(folder, every_n_train_steps=4, save_top_k=-1, filename="{step}")
    module, trainer = prepare(folder, base, ranks, watch, export, saving)
    trainer.fit(module, runs.mixture(files, base, seed=0))
    (metrics,) = trainer.test(module, runs.mixture(files, base, eval_batch_size=4))
    trainer.predict(module, runs.mixture(files, base, eval_batch_size=4))
    found = {
        "supports": watch.supports,
        "losses": watch.losses,
        "values": values(module),
        "results": module.results,
        "metrics": metrics,
        "reduced_bytes": watch.reduced_bytes,
        "synchronised_buffers": watch.synchronised_buffers,
    }
    if ranks > 1:
        rest, again = prepare(folder, base, ranks, enable_checkpointing=False, use_distributed_sampler=False)
        again.fit(rest, runs.mixture(files, base, seed=0), ckpt_path=folder / "step=4.ckpt")
        found["resumed"] = values(rest)
    for parts, mib in STEPS:
        found[f"step {parts} {mib}"] = choose_in_steps(folder, base, files, ranks, parts, mib)
    for name, plan in PLANS.items():
        found[name] = train(folder, base, files, ranks, model={"experts": plan})[0].expert_state()
    if find_spec("bitsandbytes"):
        quantised = {"dtype": "float32", "quantise": "nf4"}
        found["quantised"] = values(train(folder, base, files, ranks, expert=SPARSE, model=quantised)[0])
    answers = {"expert": SPARSE, "model": {"acts_on": "answer"}}
    found["of answers"] = values(train(folder, base, files, ranks, **answers)[0])
    found["masked"] = train_masked(folder, base, files, ranks)
    for name in FEW_ROWS:
        found[f"few rows {name}"] = train_few_rows(folder, base, files, ranks, name)
    found["under others"] = train_under_others(folder, base, files, ranks, trainer.global_rank)
    for name in SYSTEMS:
        found[name] = train_system(folder, base, files, ranks, name)
    for name in ALONE:
        module, _ = trained_mixtures.train(name, base, files, folder, ranks=ranks, limit_val_batches=0, max_steps=3)
        found[f"mixture {name}"] = expert_state(module.model)
    torch.save(found, folder / f"rank{trainer.global_rank}.pt")
    if ranks > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
