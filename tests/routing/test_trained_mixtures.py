"""What every trained mixture of configs/fit keeps: resume, generation, the library, GPT-2's layout, its log.

Two processes train each of them in `tests/training/test_ddp.py`.
"""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tokenizer
from lightning.pytorch.callbacks import ModelCheckpoint
from testbed.trained_mixtures import MIXTURES, train

from modular_experts.base import Base
from modular_experts.injection import expert_state
from modular_experts.injection.attach import attached
from modular_experts.routing.gates import reading
from modular_experts.training.export_expert import ExportExpert

each_mixture = pytest.mark.parametrize("name", MIXTURES)
ARCHITECTURE = dict(zip(MIXTURES, ["llama", "gpt2"] * 3, strict=False))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny, task_files) -> Callable[..., tuple[Any, Any, Path]]:
    """Return a function that trains a mixture once; it has a checkpoint of the fourth of six steps, and is exported."""

    @cache
    def run(name: str) -> tuple[Any, Any, Path]:
        folder, architecture = tmp_path_factory.mktemp(name), ARCHITECTURE[name]
        saving = ModelCheckpoint(folder, every_n_train_steps=4, save_top_k=-1, filename="{step}")
        callbacks = (saving, ExportExpert(str(folder / "library"), "mine", monitor=None))
        how = {"enable_checkpointing": True, "everywhere": architecture == "gpt2"}
        return (*train(name, tiny(architecture), task_files, folder, *callbacks, **how), folder)

    return run


def prompts() -> dict[str, torch.Tensor]:
    """Return two prompts of different lengths, padded on the left."""
    tokenizer = build_tokenizer()
    tokenizer.padding_side = "left"
    return dict(tokenizer(["upper bat:", "reverse the word dent:"], return_tensors="pt", padding=True))


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("name", [name for name in ("molora", "moa", "lora-ir") if name in MIXTURES])
def test_a_run_resumed_in_mid_epoch_ends_with_the_same_numbers(name, trained, tiny, task_files, tmp_path) -> None:
    module, _, folder = trained(name)
    how = {"resume": folder / "step=4.ckpt", "everywhere": ARCHITECTURE[name] == "gpt2"}
    again = partial(train, name, tiny(ARCHITECTURE[name]), task_files, tmp_path, **how)
    early, rest = (again(max_steps=steps)[0] for steps in (4, 6))
    whole, found = expert_state(module.model), expert_state(rest.model)
    assert whole.keys() == found.keys()
    assert all(torch.equal(tensor, found[key]) for key, tensor in whole.items())
    assert not all(torch.equal(tensor, whole[key]) for key, tensor in expert_state(early.model).items())


@each_mixture
def test_generation_with_a_cache_is_generation_without(name, trained) -> None:
    model = trained(name)[0].model.eval()
    how = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "output_logits": True}
    # Without a cache an answer is read again, and is told from its prompt.
    with reading(prompts()["attention_mask"].bool()):
        cached, whole = (
            model.generate(**prompts(), **how, use_cache=use_cache, return_dict_in_generate=True)
            for use_cache in (True, False)
        )
    assert torch.equal(cached.sequences, whole.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(whole.logits), rtol=1e-9, atol=1e-9)


@each_mixture
def test_a_stored_mixture_reopens_as_it_was_trained(name, trained, tiny) -> None:
    module, _, folder = trained(name)
    model = Base.open(tiny(ARCHITECTURE[name])).load("float64")
    with torch.no_grad():
        before, wanted = model(**prompts()).logits, module.model.eval()(**prompts()).logits
        with attached(model, folder / "library" / "mine"):
            torch.testing.assert_close(model(**prompts()).logits, wanted, rtol=1e-9, atol=1e-9)
        assert torch.equal(model(**prompts()).logits, before)
    assert (wanted - before).abs().max() > 1e-3


@each_mixture
def test_penalties_are_logged_by_name(name, trained) -> None:
    logged = trained(name)[1].logged_metrics
    found = {key.removeprefix("penalty/"): value for key, value in logged.items() if key.startswith("penalty")}
    assert found.keys() == MIXTURES[name]
    assert all(value > 0 for value in found.values())
