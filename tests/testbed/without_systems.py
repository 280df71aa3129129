"""Import a copy of the package, without all systems and without each of them, and train, merge and eject with it."""

import importlib
import os
import pkgutil
import shutil
import sys
import warnings
from pathlib import Path

import lightning.pytorch  # noqa: F401 - here, so that no copy of this process takes seconds for it
import torch
import transformers


def work_without_each_system(place: Path) -> None:
    """Work with `place/modular_experts`, beside which `place/kept` has the folders of its systems."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "modular_experts"]:
        del sys.modules[name]
    warnings.simplefilter("ignore")
    os.chdir(place)
    sys.path.insert(0, str(place))
    import modular_experts

    package, kept = place / "modular_experts", place / "kept"
    assert Path(modular_experts.__file__).parent == package
    for found in pkgutil.walk_packages([str(package)], "modular_experts."):
        try:
            importlib.import_module(found.name)
        except ModuleNotFoundError as error:
            # A package for one feature, such as triton, may not be installed.
            if str(error.name).startswith("modular_experts"):
                raise
    _work(systems=0)
    folders = sorted(one.name for one in kept.iterdir())
    for folder in folders:
        shutil.copytree(kept / folder, package / "systems" / folder)
    for folder in folders:
        shutil.move(package / "systems" / folder, place / "without")
        child = os.fork()
        if not child:
            importlib.invalidate_caches()
            _work(systems=len(folders) - 1)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0, f"without {folder} something else fails"
        shutil.move(place / "without", package / "systems" / folder)


def _work(systems: int) -> None:
    from modular_experts import Average, LoRAExpert, eject, inject
    from modular_experts.discovery import import_systems
    from modular_experts.injection import task_vector

    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)
    torch.manual_seed(0)
    model, ids = transformers.AutoModelForCausalLM.from_config(config), torch.arange(8)[None]
    inject(model, LoRAExpert, "q_proj")
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], 1.0)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    ((name, delta),) = task_vector(model)
    eject(model)
    assert Average().merge([delta, delta]).dense().any(), name
    assert len(import_systems()) == systems
