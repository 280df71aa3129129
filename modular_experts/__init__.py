"""Train experts on a frozen language model, keep them in a library, merge them, and measure the merge.

Public names are imported when they are first used, so that `import modular_experts` costs nothing.
"""

import importlib
from typing import Any

__version__ = "0.2.0"

_HOMES = {
    "modular_experts.deltas.task_vector": ("TaskVector",),
    "modular_experts.deltas": ("BlockSparse", "Delta", "Dense", "LowRank", "Sparse"),
    "modular_experts.experts": (*("Expert", "FullExpert", "LoRAExpert", "MaskedExpert", "SparseExpert"),),
    "modular_experts.injection": ("eject", "inject"),
    "modular_experts.merging.route": ("route",),
    "modular_experts.merging.combine": ("combine",),
    "modular_experts.merging.adapt": ("adapt",),
    "modular_experts.injection.attach": ("NamedExperts",),
    "modular_experts.injection.routed": ("routed",),
    "modular_experts.injection.save": ("save_expert",),
    "modular_experts.routing": ("Centroid", "KernelRidge", "Oracle", "Router"),
    "modular_experts.library": ("Library", "StoredExpert", "open_expert", "write_expert"),
    "modular_experts.library.described": ("trust",),
    "modular_experts.merging.interference": ("interference",),
    "modular_experts.merging.merged": ("Merged", "merge", "write_merged"),
    "modular_experts.training.fit": ("FitSettings", "check_fit", "estimate_fit", "fit"),
    "modular_experts.training.module": ("ExpertModule",),
    "modular_experts.data": ("Task", "TaskMixture"),
    "modular_experts.data.look": ("look",),
    "modular_experts.evaluation": ("evaluate", "measure"),
    "modular_experts.evaluation.streaming": ("generate",),
    "modular_experts.training.export_expert": ("ExportExpert",),
    "modular_experts.training.gradient_mask": ("GradientMask",),
    "modular_experts.training.train_under_others": ("TrainUnderOthers",),
    "modular_experts.selection.mask_schedule": ("MaskSchedule",),
    "modular_experts.merging.gradient_search": ("ATLAS", "AdaMerging"),
    "modular_experts.merging.objective": ("Objective",),
    "modular_experts.merging.search": ("search",),
    "modular_experts.merging.tune": ("tune",),
    "modular_experts.merging.distill": ("distill", "distill_into"),
    "modular_experts.merging.shrink": ("shrink",),
    "modular_experts.base": ("Base",),
    "modular_experts.base.device": ("use_device",),
    "modular_experts.base.apply": ("applied", "apply", "apply_deltas", "check_loaded"),
    "modular_experts.interop.import_expert": ("import_expert", "import_experts"),
    "modular_experts.interop.peft": ("export", "read_peft"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    # The catalogue of merge methods is `modular_experts.methods`: a class that is not listed here is looked up there.
    home = _HOME.get(name, "modular_experts.methods" if name[:1].isupper() else "")
    value = getattr(importlib.import_module(home), name, None) if home else None
    if value is None:
        raise AttributeError(f"module 'modular_experts' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
