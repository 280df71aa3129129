"""Trainings of one process, or of ranks that share the base between them; each rank writes what it ends with."""

import json
import os
import warnings
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning.pytorch.loops.utilities
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from testbed import runs
from testbed.trained_mixtures import of_config
from torch.distributed.tensor import DTensor

from modular_experts.evaluation import likelihood
from modular_experts.experts import FullExpert, LoRAExpert, SparseExpert
from modular_experts.library import open_expert
from modular_experts.masks import GrowAndDrop
from modular_experts.selection.mask_schedule import MaskSchedule
from modular_experts.training.export_expert import ExportExpert
from modular_experts.training.train_under_others import TrainUnderOthers

SPARSE = partial(SparseExpert, keep_ratio=0.1)
KINDS = {
    "entries": SPARSE,
    "tiles": partial(SparseExpert, keep_ratio=0.2, granularity="block", block_size=4),
    "lora": partial(LoRAExpert, rank=2),
}
QUANTISED = {
    "nf4": {"kind": "lora", "modules": "all-linear"},
    "int8": {"kind": "entries", "modules": "all-linear"},
    "fp4": {"kind": "entries", "modules": "layers.0.self_attn.q_proj"},
}
QUANTISED = QUANTISED if find_spec("bitsandbytes") else {}
WIDE = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 80}
"""Sizes of a base whose rows are whole blocks of 64 numbers; the rows of `down_proj` have 80."""
SHORT = {"max_steps": 4, "limit_val_batches": 0}
CLIPPED = {"gradient_clip_val": 0.05, "accumulate_grad_batches": 2}
TIED = {
    "experts": {"q_proj|down_proj": KINDS["entries"], "embed_tokens": KINDS["lora"], "norm|k_proj": FullExpert},
    "expert": None,
    "modules": None,
    "gradient_checkpointing": True,
}
"""An expert on the tensor that embedding and head share, whose model caps the logits; full ones of other weights."""


def train(folder: Path, base: Path, files: dict[str, Path], ranks: int, kind: str, keep: str = "", **how):
    """Train six steps, or `max_steps`; return the module and what was trained.

    Args:
        keep: Keep checkpoints under this name, and the expert if it is its kind.
        how: Settings of the trainer, settings of the module as `model`, and `ckpt` to go on from.
    """
    seed_everything(0, verbose=False)
    optimizer, own, ckpt = partial(torch.optim.SGD, lr=0.5, momentum=0.9), how.pop("model", {}), how.pop("ckpt", None)
    place = {"devices": ranks, "strategy": "ddp"} if ranks > 1 else {}
    batches: Any = "step" if "gradient_clip_val" in how else 2
    choices = MaskSchedule(rule=GrowAndDrop(every=3, until=0.9, replace=0.4), batches=batches, seed=0)
    callbacks = [] if kind == "lora" else [choices]
    if keep:
        callbacks.append(ModelCheckpoint(folder, every_n_train_steps=2, save_top_k=-1, filename=f"{keep}-{{step}}"))
    if keep == kind:
        callbacks.append(ExportExpert(str(folder / "library"), kind, overwrite=True))
    model = {"expert": KINDS[kind], "dtype": "float64", "optimizer": optimizer, "shard_base": ranks > 1}
    module = runs.module(base, **(model | own))
    trainer = runs.trainer(folder, *callbacks, **place, enable_checkpointing=bool(keep), **how)
    trainer.fit(module, runs.mixture(files, base, seed=0), ckpt_path=ckpt)
    found = {name: one.detach() for name, one in module.named_parameters() if one.requires_grad}
    found |= {name: one for name, one in module.named_buffers() if name.endswith("indices")}
    return module, found | {name: one for name, one in trainer.callback_metrics.items() if "loss" in name}


class Broken(LoRAExpert):
    """Fails in the forward pass of a training step."""

    def forward(self, x, weight, bias):
        if torch.is_grad_enabled() and self.training:
            raise ValueError("the pass broke")
        return super().forward(x, weight, bias)


def refusals(folder: Path, base: Path, files: dict[str, Path]) -> list[str]:
    """Return the sentences with which trainings end that two processes with a sharded base cannot do."""
    names = [*files]
    others, found = TrainUnderOthers([str(folder / "library" / "entries")], count=1), []
    for expert, callbacks, more in [(SPARSE, [others], {}), (Broken, [], {}), (None, [], of_config("lora-ir"))]:
        module = runs.module(base, expert, dtype="float64", shard_base=True, **more)
        trainer = runs.trainer(folder, *callbacks, devices=2, strategy="ddp", limit_val_batches=0)
        try:
            trainer.fit(module, runs.mixture({name: files[name] for name in names[-1 - len(more) :]}, base))
        except ValueError as error:
            found.append(str(error))
    return found


def answer(folder: Path, base: Path, files: dict[str, Path], ranks: int) -> dict:
    """Train one step, and return the scores of rows whose choices and answers take other numbers of passes."""
    numbers, splits = range(12), ["train", "validation", "test"]
    rows = [{"input": f"{n} is", "target": str(n), "choices": list(map(str, range(n, 6 * n + 2)))} for n in numbers]
    files = {"few": folder / "few.jsonl", "upper": files["upper"]}
    text = "".join(json.dumps(row | {"split": splits[number % 3]}) + "\n" for number, row in enumerate(rows))
    files["few"].write_text(text)
    place = {"devices": ranks, "strategy": "ddp"} if ranks > 1 else {}
    module = runs.module(base, KINDS["tiles"], dtype="float64", shard_base=ranks > 1)
    data, found = runs.mixture(files, base, eval_batch_size=2 * ranks), {}
    trainer = runs.trainer(folder, max_steps=1, **place)
    with patch.object(lightning.pytorch.loops.utilities, "_distributed_is_initialized", lambda: False):
        # Lightning then evaluates in inference mode, as it does over nccl.
        found["validate"] = trainer.validate(module, data, verbose=False)
        trainer.fit(module, data)
        found["fit"] = {name: value.item() for name, value in trainer.callback_metrics.items()}
        answers = [row["generation"] for batch in trainer.predict(module, data) for row in batch]
    return found | {"answers": answers}


def rank_of(ranks: int) -> int:
    return torch.distributed.get_rank() if ranks > 1 else 0


def finish(folder: Path, ranks: int, found: dict) -> None:
    """Keep what a process found, and end together with the others."""
    torch.save(found, folder / f"rank{rank_of(ranks)}.pt")
    if ranks > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def resume(folder: Path, base: Path, files: dict[str, Path], ranks: int, checkpoint: Path) -> None:
    """Go on from the checkpoint of a run of other processes."""
    warnings.simplefilter("ignore")
    finish(folder, ranks, {"resumed": train(folder, base, files, ranks, "entries", "entries", ckpt=checkpoint)[1]})


def main(folder: Path, base: Path, wide: Path, capped: Path, mixed: Path, files: dict[str, Path], ranks: int) -> None:
    warnings.simplefilter("ignore")
    found = {}
    for kind in KINDS:
        module, found[kind] = train(folder, base, files, ranks, kind, keep=kind)
    frozen = [one for one in module.parameters() if not one.requires_grad]
    found["held"] = sum(one.to_local().numel() if isinstance(one, DTensor) else one.numel() for one in frozen)
    found["clipped"] = train(folder, base, files, ranks, "entries", limit_val_batches=0, **CLIPPED)[1]
    middle = folder.parent / "one" / "entries-step=4.ckpt"
    found["resumed"] = train(folder, base, files, ranks, "entries", ckpt=middle, limit_val_batches=0)[1]
    # One process has batches with large logits, and the other has none.
    likelihood.HEAD_BYTES = 2**28 if rank_of(ranks) else 0
    on_top = {"applied": [str(folder / "library" / "lora")], "gradient_checkpointing": True}
    found["on top"] = train(folder, base, files, ranks, "entries", model=on_top, max_steps=4)[1]
    module, found["tied"] = train(folder, capped, files, ranks, "entries", model=TIED, max_steps=4)
    if not rank_of(ranks):  # one process alone exports
        found["moved"] = {name: delta.dense() for name, delta in module.task_vector()}
    likelihood.HEAD_BYTES = 2**28
    for form, how in QUANTISED.items():
        own = {"quantise": form, "dtype": "float32", "modules": how["modules"]}
        module, found[form] = train(folder, wide, files, ranks, how["kind"], model=own, **SHORT)
        found[f"parted {form}"] = sorted(
            {name.split(".")[-2] for name, one in module.named_parameters() if isinstance(one, DTensor)}
        )
    # torch multiplies the matrices of a mixture, which are parted like other weights, in at most float32.
    on_attention = {"modules": "q_proj", "dtype": "float32"}
    found["of a mixture"] = train(folder, mixed, files, ranks, "entries", model=on_attention, **SHORT)[1]
    found["scores"] = answer(folder, base, files, ranks)
    found["refusals"] = refusals(folder, base, files) if ranks > 1 else []
    found["hashes"] = [open_expert(folder / "library" / kind).content_hash for kind in KINDS]
    finish(folder, ranks, found)


def break_one(folder: Path, base: Path, files: dict[str, Path]) -> None:
    """Train with an expert that fails in one of two processes."""
    warnings.simplefilter("ignore")
    kind = Broken if os.environ["LOCAL_RANK"] == "1" else LoRAExpert
    module = runs.module(base, partial(kind, rank=2), shard_base=True)
    runs.trainer(folder, devices=2, strategy="ddp").fit(module, runs.mixture(files, base))
