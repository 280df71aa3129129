"""Trainings of one process, or of ranks that share the base between them; each rank writes what it ends with."""

import warnings
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from testbed import runs
from torch.distributed.tensor import DTensor

from modular_experts.callbacks import ExportExpert, MaskSchedule
from modular_experts.experts import LoRAExpert, SparseExpert
from modular_experts.library import open_expert
from modular_experts.masks import GrowAndDrop

KINDS = {
    "entries": partial(SparseExpert, keep_ratio=0.1),
    "tiles": partial(SparseExpert, keep_ratio=0.2, granularity="block", block_size=4),
    "lora": partial(LoRAExpert, rank=2),
}
PARTS = {
    "plain": {},
    "clipped": {"gradient_clip_val": 0.05},
    "accumulated": {"accumulate_grad_batches": 2},
}


def train(folder: Path, base: Path, files: dict[str, Path], ranks: int, kind: str, ckpt: Path | None = None, **how):
    """Train six steps; return the module and what was trained."""
    seed_everything(0, verbose=False)
    optimizer = partial(torch.optim.SGD, lr=0.5, momentum=0.9)
    place = {"devices": ranks, "strategy": "ddp"} if ranks > 1 else {}
    checkpoints = [ModelCheckpoint(folder, every_n_train_steps=3, save_top_k=-1, filename=f"{kind}-{{step}}")]
    export = ExportExpert(str(folder / "library"), kind, overwrite=True)
    choices = [MaskSchedule(rule=GrowAndDrop(every=3, until=0.9, replace=0.4), batches=2, seed=0)]
    schedules = [] if kind == "lora" else choices
    kept = {} if how or ckpt else {"enable_checkpointing": True}
    callbacks = [*schedules, *([] if how or ckpt else [*checkpoints, export])]
    model = {"dtype": "float64", "optimizer": optimizer, "shard_base": ranks > 1}
    module = runs.module(base, KINDS[kind], **model)
    trainer = runs.trainer(folder, *callbacks, **place, **kept, **how)
    trainer.fit(module, runs.mixture(files, base, seed=0), ckpt_path=ckpt)
    found = {name: one.detach() for name, one in module.named_parameters() if one.requires_grad}
    return module, found | {name: one for name, one in module.named_buffers() if name.endswith("indices")}


def main(folder: Path, base: Path, files: dict[str, Path], ranks: int) -> None:
    warnings.simplefilter("ignore")
    found = {}
    for kind in KINDS:
        for part, how in PARTS.items():
            module, found[f"{kind} {part}"] = train(folder, base, files, ranks, kind, **how)
        found[f"{kind} resumed"] = train(folder, base, files, ranks, kind, next(folder.glob(f"{kind}-*step=3.ckpt")))[1]
        found[f"{kind} hash"] = open_expert(folder / "library" / kind).content_hash
    frozen = [one for one in module.parameters() if not one.requires_grad]
    found["held"] = sum(one.to_local().numel() if isinstance(one, DTensor) else one.numel() for one in frozen)
    rank = torch.distributed.get_rank() if ranks > 1 else 0
    torch.save(found, folder / f"rank{rank}.pt")
    if ranks > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
