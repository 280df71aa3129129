"""`fit` trains what the Lightning form trains, and Lightning's finders of rates and batch sizes work."""

import logging
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import LearningRateFinder
from testbed import runs
from testbed.systems import of, there

from modular_experts import ExpertModule, ExportExpert, TaskMixture, check_fit, estimate_fit, fit
from modular_experts.experts import FullExpert, LoRAExpert, SparseExpert
from modular_experts.injection import expert_layers
from modular_experts.library import open_expert
from modular_experts.training.fit import quiet

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def tasks(task_files) -> list[str]:
    return [str(task_files["upper"])]


def test_it_is_the_lightning_form_with_its_callbacks_chosen(place, tiny_llama_dir, tasks) -> None:
    expert = partial(LoRAExpert, rank=2, dropout=0.1)
    found = fit(tiny_llama_dir, tasks, expert, runs.TARGET, "library/a", steps=4, batch_size=4, trainer=QUIET)
    seed_everything(0, workers=True, verbose=False)
    settings = QUIET | {"max_steps": 4, "use_distributed_sampler": False, "enable_model_summary": False}
    trainer = Trainer(callbacks=[ExportExpert("library", "b")], **settings)
    trainer.fit(ExpertModule(str(tiny_llama_dir), runs.TARGET, expert), TaskMixture(tasks, str(tiny_llama_dir), 4))
    other = open_expert("library/b")
    assert found.path.name == "a"
    assert found.keys() == other.keys()
    assert all(torch.equal(found[name].dense(), other[name].dense()) for name in found)
    assert found.record["scores"] == other.record["scores"]


def test_without_a_place_only_a_listed_export_keeps_the_expert(place, tiny_llama_dir, tasks) -> None:
    how = {"steps": 2, "batch_size": 4}
    assert fit(tiny_llama_dir, tasks, SparseExpert, runs.TARGET, **how, trainer=QUIET) is None
    listed = QUIET | {"callbacks": [ExportExpert("library", "mine", monitor=None)]}
    found = fit(tiny_llama_dir, tasks, SparseExpert, runs.TARGET, **how, trainer=listed)
    assert (found.name, found.record["hyperparameters"]["steps"]) == ("mine", 2)


def test_an_export_takes_settings_of_a_fit_for_this_fit_alone(place, tiny_llama_dir, tasks) -> None:
    export = ExportExpert("library", "mine", monitor=None)
    how = {"steps": 1, "batch_size": 4, "trainer": QUIET | {"callbacks": [export]}}
    arguments = tiny_llama_dir, tasks, LoRAExpert, runs.TARGET
    check_fit(*arguments, "library/elsewhere", overwrite=True, **how)
    mine = fit(*arguments, **how, keep_inputs=2)
    other = fit(*arguments, "library/other", **how, overwrite=True)
    assert [one.keeps_inputs for one in (mine, other)] == [True, False]
    with pytest.raises(FileExistsError, match="library/mine exists already"):
        fit(*arguments, **how)
    assert {path.name for path in (place / "library").iterdir()} == {"mine", "other"}


def test_without_modules_an_expert_is_a_plan(place, tiny_llama_dir, tasks) -> None:
    plan = {r".*\.q_proj": LoRAExpert}
    found = fit(tiny_llama_dir, tasks, plan, out="library/a", steps=2, batch_size=4, trainer=QUIET)
    assert all("q_proj" in name for name in found)
    with pytest.raises(ValueError, match="expert is given but not modules"):
        fit(tiny_llama_dir, tasks, LoRAExpert, out="library/b", steps=2, trainer=QUIET)


def test_an_expert_that_exists_is_refused_before_anything_is_read(place, tiny_llama_dir, tasks) -> None:
    how = {"steps": 2, "batch_size": 4, "trainer": QUIET}
    fit(tiny_llama_dir, tasks, LoRAExpert, runs.TARGET, "library/a", **how)
    with pytest.raises(FileExistsError, match="library/a exists already"):
        fit("nowhere", ["missing.jsonl"], LoRAExpert, runs.TARGET, "library/a", **how)
    assert fit(tiny_llama_dir, tasks, LoRAExpert, runs.TARGET, "library/a", overwrite=True, **how) is not None


def test_a_check_reads_neither_base_nor_rows(place) -> None:
    check_fit("nowhere", ["missing.jsonl"], LoRAExpert, ["q_proj"], "library/a", steps=2)
    assert not list(place.iterdir())
    with pytest.raises(ValueError, match=r"learning_rate=-1.* must be above 0"):
        check_fit("nowhere", ["missing.jsonl"], LoRAExpert, ["q_proj"], learning_rate=-1.0)
    with pytest.raises(ValueError, match="is not there; give a file"):
        check_fit("nowhere", ["missing.jsonl"], LoRAExpert, ["q_proj"], checkpoint="last")
    with pytest.raises(ValueError, match="a TaskMixture has its own batch_size; set that in it"):
        check_fit("nowhere", TaskMixture(["missing.jsonl"], "nowhere", 4), LoRAExpert, ["q_proj"], batch_size=8)
    with pytest.raises(ValueError, match="there is no setting step; did you mean steps"):
        check_fit("nowhere", ["missing.jsonl"], LoRAExpert, ["q_proj"], step=2)
    with pytest.raises(ValueError, match="expert='LoRAExpert' is a text; give a class"):
        check_fit("nowhere", ["missing.jsonl"], "LoRAExpert", ["q_proj"])


def test_an_estimate_trains_and_writes_nothing(place, tiny_llama_dir, tasks) -> None:
    found = estimate_fit(tiny_llama_dir, tasks, LoRAExpert, runs.TARGET, "library/a", steps=5, trainer=QUIET)
    assert found.length.total_steps == 5
    assert [str(place) for kind, place in found.places if kind == "the expert"] == ["library/a"]
    assert not list(place.iterdir())


@pytest.mark.parametrize("expert", [partial(SparseExpert, keep_ratio=0.2), partial(LoRAExpert, rank=2)])
def test_values_in_bfloat16_take_half_the_bytes_everywhere(place, tiny_llama_dir, tasks, expert) -> None:
    seen = {}

    class Look(Callback):
        def on_train_end(self, trainer, pl_module):
            trained = [parameter for parameter in pl_module.parameters() if parameter.requires_grad]
            states = [value for state in trainer.optimizers[0].state.values() for value in state.values()]
            seen.update(dtypes={own.dtype for own in [*trained, *(one for one in states if one.ndim)]})
            seen.update(vector={name: delta.dense() for name, delta in pl_module.task_vector()})
            for name, layer in expert_layers(pl_module.model):
                if isinstance(layer.expert, SparseExpert):
                    kept = layer.expert.anchor + layer.expert.values.float()
                    assert torch.equal(layer.weight.view(-1)[layer.expert.indices], kept), name

    how = {"steps": 4, "batch_size": 4, "trainer": QUIET | {"callbacks": [Look()]}}
    found = fit(tiny_llama_dir, tasks, expert, runs.TARGET, "library/a", model={"values": "bfloat16"}, **how)
    assert seen["dtypes"] == {torch.bfloat16}
    assert found.record["encoding"] == "bfloat16"
    assert all(torch.equal(found[name].dense(), seen["vector"][name]) for name in found)
    wide = fit(tiny_llama_dir, tasks, expert, runs.TARGET, "library/b", **how)
    assert all(found.stored_bytes()[name] < 0.75 * wide.stored_bytes()[name] for name in wide)


SHARING = there({"recast": lambda: of("recast.TemplateBanks")(), "lora-ir": lambda: of("lora_ir.LoRAIR", experts=2)()})
"""Plans whose experts share templates, or have a router that no optimizer sees."""


@pytest.mark.parametrize("name", SHARING)
def test_values_in_bfloat16_are_for_what_the_optimizer_trains(place, tiny_llama_dir, task_files, name) -> None:
    files, model = [str(path) for path in task_files.values()][:2], {"values": "bfloat16"}
    found = fit(
        tiny_llama_dir, files, SHARING[name], out="library/a", steps=2, batch_size=4, model=model, trainer=QUIET
    )
    assert found.record["encoding"] == "bfloat16"


def test_values_in_bfloat16_are_refused_for_the_weight_itself(place, tiny_llama_dir, tasks) -> None:
    with pytest.raises(ValueError, match=r"values=bfloat16 is for experts beside a weight, and the one of .* trains"):
        fit(tiny_llama_dir, tasks, FullExpert, runs.TARGET, steps=2, model={"values": "bfloat16"}, trainer=QUIET)


@pytest.mark.filterwarnings("ignore")  # the finder loads a checkpoint of its own, and warns of evaluation mode
def test_a_found_rate_trains_as_the_same_rate_typed_in(fitted):
    def run(*callbacks, rate=None):
        return fitted(SparseExpert, *callbacks, own={"optimizer": None, "learning_rate": rate})[0]

    found = run(LearningRateFinder(num_training_steps=20, min_lr=1e-4, max_lr=0.1))
    assert 1e-4 < found.learning_rate < 0.1
    typed = run(rate=found.learning_rate).state_dict()
    assert all(torch.equal(tensor, typed[name]) for name, tensor in found.state_dict().items())


def test_a_fit_leaves_the_log_of_other_trainers_alone_and_advertises_nothing(tmp_path, caplog) -> None:
    with caplog.at_level(logging.INFO):
        with quiet():
            Trainer(default_root_dir=tmp_path, logger=False)
        assert not caplog.text
        Trainer(default_root_dir=tmp_path, logger=False)
    assert "GPU available" in caplog.text
