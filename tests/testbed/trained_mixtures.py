"""Short runs of the trained mixtures of configs/fit, in one process or as a rank of several."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, Trainer, seed_everything
from testbed import runs

from modular_experts.experts import Expert
from modular_experts.experts.site import LayerPlan
from modular_experts.library.described import find_class
from modular_experts.training.module import ExpertModule

__all__ = ["MIXTURES", "of_config", "train"]

MIXTURES = {
    "molora": {"balance"},
    "goat": {"balance"},
    "hilo": {"balance"},
    "moa": set(),
    "lora-ir": set(),
    "point-lora": {"entropy"},
}
"""Each trained mixture by the name of its file in configs/fit, with the names of its penalties."""

CONFIGS = Path(__file__).parents[2] / "configs" / "fit"


def of_config(name: str, everywhere: bool = False) -> dict[str, Any]:
    """Return the `expert` and `modules`, or the `experts`, of a configuration; in all linear layers if `everywhere`."""
    model = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))["model"]
    key = "experts" if "experts" in model else "expert"
    type_, settings = find_class(model[key]["class_path"], LayerPlan, Expert), model[key].get("init_args", {})
    if key == "experts":
        # GPT-2 makes queries, keys and values by one layer, where prompts cannot be.
        return {"experts": type_(**settings | ({"prompts": 0} if everywhere and "prompts" in settings else {}))}
    return {"expert": partial(type_, **settings), "modules": "all-linear" if everywhere else model["modules"]}


def train(
    name: str,
    base: Path,
    files: dict[str, Path],
    folder: Path,
    *callbacks: Callback,
    ranks: int = 1,
    resume: Path | None = None,
    everywhere: bool = False,
    **settings: Any,
) -> tuple[ExpertModule, Trainer]:
    """Train a mixture for six steps in float64, and return the module and its trainer."""
    seed_everything(0, verbose=False)
    optimizer = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.0)
    module = ExpertModule(str(base), **of_config(name, everywhere), optimizer=optimizer, dtype="float64")
    place = {"devices": ranks, "strategy": "ddp" if ranks > 1 else "auto"}
    trainer = runs.trainer(folder, *callbacks, **(place | settings))
    trainer.fit(module, runs.mixture(files, base, seed=0), ckpt_path=resume)
    return module, trainer
