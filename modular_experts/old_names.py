"""The module names of version 1, whose class paths stay in stored records, configs and recipes.

`current_name` translates a dotted name. `install_old_names` lets Python import the old modules as the new ones, for
configs such as `class_path: modular_experts.merging.ties.TIES`; the command line installs it, the package does not.
"""

from __future__ import annotations

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import ModuleType

# New module -> the modules of version 1 that it took in, both below `modular_experts`.
_TOOK_IN = {
    "base": "interop.checkpoint",
    "base.apply": "interop.apply",
    "base.files": "interop.fingerprint",
    "base.structure": "interop.skeleton",
    "base.weights": "interop.stored",
    "callbacks.results": "callbacks.predictions",
    "data.sampler": "data.mixing",
    "data.tasks": "data.splits data.where",
    "deltas.task_vector": "task_vector",
    "deltas.tiles": "blocks",
    "evaluation.scores": "evaluation.rouge",
    "hub.pull": "interop.pull",
    "hub.push": "interop.push",
    "interop.compression": "interop.forms",
    "interop.import_expert": "interop.sources",
    "library.atomic": "library.paths",
    "library.compatibility": "library.together",
    "library.packing": "library.encoding",
    "library.statistics": "library.gathering",
    "merger.estimate": "merge_estimate",
    "merger.remove": "removal",
    "merger.rules": "merge_rules",
    "methods": "merging",
    "methods.average": "merging.sparse_average merging.task_arithmetic",
    "methods.chunks": "merging.entries merging.parts",
    "methods.consensus": "merging.combining",
    "methods.iso_c": "merging.iso_cts",
    "methods.method": "merging.statistic",
    "methods.prune": "merging.cut merging.threshold merging.trimming",
    "methods.random_numbers": "merging.coins",
    "methods.reg_mean": "merging.reg_mean_plus_plus merging.ridge merging.self_reg_mean",
    "methods.set_operations": "merging.supports",
    "methods.settings": "merging.presets merging.shares",
    "methods.slerp": "merging.multi_slerp merging.nu_slerp",
    "methods.ties": "merging.magnitude_prune",
    "selection": "callbacks.moments",
    "selection.avoid": "callbacks.neighbours masks.crowding",
    "selection.choice": "callbacks.selection",
    "selection.scoring": "callbacks.footprint callbacks.scoring",
    "testing.methods": "merge_testing",
    "text": "sizes",
    "training.learning_rate": "learning_rate training_length",
    "training.module": "module random_state",
    "tuning": "search search.search",
    "tuning.gradient_search": "search.ada_merging search.atlas search.descent",
    "tuning.lora_hub": "search.evolution",
    "tuning.tune": "search.scales",
}
_PACKAGE = "modular_experts"

MOVED = {f"{_PACKAGE}.{old}": f"{_PACKAGE}.{new}" for new, modules in _TOOK_IN.items() for old in modules.split()}
"""Old dotted prefix -> new one; a module of a moved package that is not listed kept its own name in it."""


def current_name(dotted: str) -> str:
    """Return the present dotted name of a module or class of version 1; any other name is returned as it is."""
    parts = dotted.split(".")
    for count in range(len(parts), 0, -1):
        if new := MOVED.get(".".join(parts[:count])):
            return ".".join([new, *parts[count:]])
    return dotted


def install_old_names() -> None:
    """Let the old names import as the new modules, from now on in this process."""
    if not any(isinstance(finder, _OldNames) for finder in sys.meta_path):
        # In front, or Python's own finder would load methods/ties.py again as merging/ties.py.
        sys.meta_path.insert(0, _OldNames())


class _OldNames(MetaPathFinder, Loader):
    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return spec_from_loader(fullname, self) if current_name(fullname) != fullname else None

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        # What sys.modules holds after this is what the import gives, instead of the empty module.
        sys.modules[module.__name__] = importlib.import_module(current_name(module.__name__))
