"""What a Lightning user tries unread: the stock LightningCLI, `load_from_checkpoint`, metrics of a trainer."""

import contextlib
import csv
import logging
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from testbed import runs
from torch.utils.data import DataLoader

from modular_experts import ExpertModule, TaskMixture
from modular_experts.__main__ import main
from modular_experts.experts import LoRAExpert
from modular_experts.injection import named_experts
from modular_experts.library import open_expert
from modular_experts.training.fit import fit

pytestmark = pytest.mark.filterwarnings("ignore")  # what Lightning says about a trainer that a user makes

EXPERT = ["--model.modules", "[q_proj]", "--model.expert", "LoRAExpert", "--model.expert.rank", "2"]
SHORT = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.max_steps"]


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Be in a new folder, in a program without words of its own, which LightningCLI would warn about."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])


@pytest.fixture
def stock(one_block: Path, task_files: dict[str, Path]) -> Callable[..., LightningCLI]:
    """Lightning's command line on our two classes, for two steps if no others are given."""
    given = ["--model.base", str(one_block), "--data.tasks", f"[{task_files['upper']}]", "--model.max_new_tokens", "2"]

    def run(verb: str, *words: str, steps: int = 2, cli: type[LightningCLI] = LightningCLI, **how) -> LightningCLI:
        return cli(ExpertModule, TaskMixture, args=[verb, *given, *SHORT, str(steps), *words], **how)

    return run


def _checkpoint(cli: LightningCLI) -> str:
    keeper = cli.trainer.checkpoint_callback
    assert isinstance(keeper, ModelCheckpoint)
    return keeper.best_model_path


def test_the_stock_command_line_trains_resumes_and_tests_and_lightning_opens_its_checkpoint(stock) -> None:
    first = stock("fit", *EXPERT)
    folder = Path(first.trainer.log_dir)
    assert {"config.yaml", "metrics.csv", "checkpoints"} <= {file.name for file in folder.iterdir()}
    checkpoint = _checkpoint(first)
    resumed = stock("fit", *EXPERT, "--ckpt_path", checkpoint, steps=3)
    assert resumed.trainer.global_step == 3
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        module = ExpertModule.load_from_checkpoint(checkpoint)
    assert not [warning for warning in warned if "Found keys" in str(warning.message)], "no key of the base is missing"
    trained = dict(named_experts(first.model.model))
    for name, expert in named_experts(module.model):
        assert isinstance(expert, LoRAExpert)
        assert torch.equal(expert.up, trained[name].up)
    tested = stock("test", *EXPERT, "--ckpt_path", checkpoint)
    assert tested.trainer.callback_metrics["test_loss"] == pytest.approx(tested.model.results["held_in"]["loss"])
    again = stock("test", "--config", str(folder / "config.yaml"), "--ckpt_path", checkpoint)
    assert again.model.results["tasks"] == tested.model.results["tasks"]


def test_callbacks_and_experts_are_found_by_short_name_and_by_path(stock) -> None:
    export = ["--trainer.callbacks", "ExportExpert", "--trainer.callbacks.library", "library"]
    schedule = ["--trainer.callbacks+=modular_experts.selection.mask_schedule.MaskSchedule"]
    sparse = ["--model.modules", "[q_proj]", "--model.expert", "modular_experts.experts.SparseExpert"]
    stock("fit", *sparse, *export, "--trainer.callbacks.name", "mine", *schedule, steps=1)
    assert open_expert("library/mine").record["kind"] == "SparseExpert"


def test_subclasses_of_both_classes_may_be_named(one_block, task_files) -> None:
    words = ["--model", "ExpertModule", "--model.base", str(one_block), *EXPERT]
    words += ["--data", "TaskMixture", "--data.tasks", f"[{task_files['upper']}]", *SHORT, "1"]
    cli = LightningCLI(
        ExpertModule, TaskMixture, subclass_mode_model=True, subclass_mode_data=True, args=["fit", *words]
    )
    assert isinstance(ExpertModule.load_from_checkpoint(_checkpoint(cli)), ExpertModule)


class Linked(LightningCLI):
    """A command line that links arguments of data and model, and has `--optimizer`."""

    def add_arguments_to_parser(self, parser) -> None:
        parser.link_arguments("data.max_length", "model.max_new_tokens", compute_fn=lambda longest: longest // 8)
        parser.add_optimizer_args(nested_key="optimizer", link_to="model.optimizer")


def test_arguments_can_be_linked(one_block, task_files) -> None:
    words = ["--model.base", str(one_block), *EXPERT, "--data.tasks", f"[{task_files['upper']}]", *SHORT, "1"]
    words += ["--data.max_length", "80", "--optimizer", "torch.optim.SGD", "--optimizer.lr", "0.5"]
    cli = Linked(ExpertModule, TaskMixture, args=["fit", *words])
    assert cli.model.max_new_tokens == 10
    (optimizer,) = cli.trainer.optimizers
    assert isinstance(optimizer, torch.optim.SGD)
    module = ExpertModule.load_from_checkpoint(_checkpoint(cli))
    assert module.max_new_tokens == 10


def test_data_take_the_tokenizer_of_the_module_that_a_trainer_runs(
    one_block, tiny_llama_dir, task_files, tmp_path
) -> None:
    data = TaskMixture([str(task_files["upper"])])
    runs.trainer(tmp_path, max_steps=1).fit(runs.module(one_block, partial(LoRAExpert, rank=2)), data)
    assert data.tokenizer.name_or_path == str(one_block)
    runs.trainer(tmp_path).test(runs.module(tiny_llama_dir, None), data)
    assert data.tokenizer.name_or_path == str(tiny_llama_dir), "a borrowed one is given back"
    own = TaskMixture([str(task_files["upper"])], tokenizer=str(one_block))
    runs.trainer(tmp_path).test(runs.module(tiny_llama_dir, None), own)
    assert own.tokenizer.name_or_path == str(one_block)


def test_a_trainer_returns_the_metrics_of_its_table_and_prints_one_table(
    one_block, task_files, tmp_path, capsys
) -> None:
    module, data = runs.module(one_block, None), runs.mixture(task_files, one_block)
    (found,) = runs.trainer(tmp_path).test(module, data)
    tasks = module.results["tasks"]
    assert [scores["role"] for scores in tasks.values()] == ["held_in", "held_in", "held_out"]
    wanted = {
        f"test_{score}/{task}": tasks[task][score] for task in tasks for score in ("loss", "exact_match", "rougeL")
    }
    wanted |= {f"test_{score}": value for score, value in module.results["held_in"].items()}
    wanted |= {f"test_{score}_held_out": value for score, value in module.results["held_out"].items()}
    assert found == pytest.approx(wanted)
    printed = capsys.readouterr().out
    assert printed.count("held-in") == 3
    assert "test_loss" not in printed
    (found,) = runs.trainer(tmp_path).validate(module, data)
    assert found["val_loss"] == pytest.approx((found["val_loss/upper"] + found["val_loss/reverse"]) / 2)
    assert {"val_exact_match", "val_rougeL/upper"} <= found.keys()
    assert "val_loss" not in capsys.readouterr().out


class OwnData(LightningDataModule):
    """A data module of the user's own, with one batch of token ids."""

    def __init__(self, rows: int = 2) -> None:
        super().__init__()
        self.rows = rows

    def train_dataloader(self) -> DataLoader:
        ids = torch.arange(3, 3 + 4 * self.rows).view(self.rows, 4)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids, "task": ["own"] * self.rows}
        return DataLoader([batch], batch_size=None)


def test_a_data_module_of_ones_own_trains_an_expert(one_block) -> None:
    words = ["--model.base", str(one_block), *EXPERT, "--data", f"{__name__}.OwnData", "--data.rows", "3", *SHORT, "1"]
    cli = LightningCLI(ExpertModule, args=["fit", *words, "--trainer.limit_val_batches", "0"])
    assert isinstance(cli.datamodule, OwnData)
    assert cli.trainer.global_step == 1


def test_each_of_two_fits_in_one_process_shows_its_lines(one_block, task_files, tmp_path, monkeypatch, capsys) -> None:
    """Also one by a trainer of the user's, unless the program says where log lines go."""
    monkeypatch.setattr(logging.getLogger("modular_experts"), "propagate", False)  # pytest has set the root logger up
    expert, files = partial(LoRAExpert, rank=2), {"upper": task_files["upper"]}
    fit(str(one_block), str(task_files["upper"]), expert, ["q_proj"], tmp_path / "library/mine", steps=1)
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("step 1/1: loss ")]
    for _ in range(2):
        runs.trainer(tmp_path, max_steps=1).fit(runs.module(one_block, expert), runs.mixture(files, one_block))
        own = capsys.readouterr().err.splitlines()
        assert len([line for line in own if line.startswith("step 1/1: loss ")]) == 1
        assert "upper: 12 rows in an epoch" in own
    with pytest.raises(ValueError, match="no experts to train"):
        runs.trainer(tmp_path, max_steps=1).fit(runs.module(one_block, None), runs.mixture(files, one_block))
    assert not logging.getLogger("modular_experts").handlers


@pytest.fixture
def files(one_block: Path, task_files: dict[str, Path]) -> dict[str, list[str]]:
    """A user's files, one for the whole run and one for each group, as words of the command."""
    groups = {
        "model": {
            "base": str(one_block),
            "modules": ["q_proj"],
            "expert": {"class_path": "LoRAExpert", "init_args": {"rank": 2}},
            "max_new_tokens": 2,
        },
        "data": {"tasks": [str(task_files["upper"])]},
        "trainer": {"max_steps": 2, "accelerator": "cpu"},
    }
    for name, settings in groups.items():
        Path(f"{name}.yaml").write_text(yaml.safe_dump(settings))
    Path("run.yaml").write_text(yaml.safe_dump(groups))
    Path("longer.yaml").write_text("trainer: {max_steps: 3}\nmodel: {expert: {init_args: {alpha: 4.0}}}\n")
    return {"run": ["--config", "run.yaml"], "groups": [f"--{name}={name}.yaml" for name in groups]}


@pytest.fixture
def settings(capsys) -> Callable[..., dict]:
    """What `--print_config` prints of a command line, as a config file."""

    def printed(*words: str, option: str = "--print_config") -> dict:
        capsys.readouterr()
        with contextlib.suppress(SystemExit):
            assert main(["fit", *words, option]) == 0
        return yaml.safe_load(capsys.readouterr().out)

    return printed


def test_later_files_change_earlier_ones_and_each_group_may_have_a_file(files, settings) -> None:
    whole = settings(*files["run"])
    assert whole == settings(*files["groups"])
    changed = settings("-c", "run.yaml", "--config", "longer.yaml", "--trainer.accelerator", "auto")
    assert changed["model"]["expert"]["init_args"] == {**whole["model"]["expert"]["init_args"], "alpha": 4.0}
    assert (changed["trainer"]["max_steps"], changed["trainer"]["accelerator"]) == (3, "auto")


def test_what_is_printed_is_a_config_of_the_same_run(files, settings) -> None:
    whole = settings(*files["run"])
    Path("whole.yaml").write_text(yaml.safe_dump(whole))
    assert settings("--config", "whole.yaml") == whole
    short = settings(*files["run"], option="--print_config=skip_default")
    assert short["trainer"].keys() <= {"max_steps", "accelerator", "default_root_dir"}
    assert short["data"].keys() == {"tasks"}
    Path("short.yaml").write_text(yaml.safe_dump(short))
    assert settings("--config", "short.yaml") == whole


def test_optimizer_scheduler_and_callbacks_are_options(files, settings) -> None:
    words = ["--optimizer", "torch.optim.SGD", "--optimizer.lr", "0.5"]
    words += ["--lr_scheduler", "torch.optim.lr_scheduler.StepLR", "--lr_scheduler.step_size", "4"]
    words += ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor", "val_loss"]
    words += ["--trainer.callbacks.patience", "3", "--trainer.callbacks+=LearningRateMonitor"]
    found = settings(*files["run"], *words)
    assert found["model"]["optimizer"]["class_path"] == "torch.optim.SGD"
    assert found["model"]["optimizer"]["init_args"]["lr"] == 0.5
    assert found["model"]["scheduler"]["init_args"]["step_size"] == 4
    early, rates = found["trainer"]["callbacks"]
    assert (early["init_args"]["patience"], rates["class_path"].rpartition(".")[2]) == (3, "LearningRateMonitor")


def test_variables_of_the_environment_lie_beneath_the_command_line(files, settings, monkeypatch) -> None:
    monkeypatch.setenv("PL_FIT__TRAINER__MAX_STEPS", "7")
    assert settings(*files["groups"][:2])["trainer"]["max_steps"] == 7
    assert settings(*files["groups"][:2], "--trainer.max_steps", "8")["trainer"]["max_steps"] == 8


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["--model.expert.help"], ["LoRAExpert", "SparseExpert"]),
        (["--model.expert.help", "LoRAExpert"], ["rank", "alpha"]),
        (["--trainer.callbacks.help"], ["EarlyStopping", "ExportExpert"]),
        (["--trainer.logger.help"], ["CSVLogger", "TensorBoardLogger"]),
        (["--optimizer.help"], ["SGD", "AdamW"]),
    ],
)
def test_help_lists_classes_and_their_settings(words, shown, capsys) -> None:
    with contextlib.suppress(SystemExit):
        assert main(["fit", *words]) == 0
    out = capsys.readouterr().out
    assert not [name for name in shown if name not in out]


class OwnModule(ExpertModule):
    """A module of the user's own, with a setting of its own, whose loss is twice as large."""

    def __init__(self, *args, factor: float = 1.0, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.factor = factor

    def loss(self, batch: dict, in_step: bool = False) -> torch.Tensor:
        Path("ran.txt").write_text(f"module {self.factor}")
        return self.factor * super().loss(batch, in_step)


class OwnTrainer(Trainer):
    """A trainer of the user's own."""

    def fit(self, *args, **kwargs) -> None:
        Path("trainer.txt").touch()
        super().fit(*args, **kwargs)


def test_classes_that_a_config_names_run_and_are_recorded(files, settings) -> None:
    own = yaml.safe_load(Path("run.yaml").read_text())
    own["model"] = {"class_path": f"{__name__}.OwnModule", "init_args": own["model"] | {"factor": 2.0}}
    own["data"] = {"class_path": f"{__name__}.OwnData", "init_args": {"rows": 3}}
    own["trainer"] = {"class_path": f"{__name__}.OwnTrainer", "init_args": own["trainer"] | {"limit_val_batches": 0}}
    Path("own.yaml").write_text(yaml.safe_dump(own))
    assert main(["fit", "--config", "own.yaml", "--seed_everything", "5"]) == 0
    assert Path("ran.txt").read_text() == "module 2.0"
    assert Path("trainer.txt").exists()
    (config,) = Path("runs").rglob("config.yaml")
    recorded = yaml.safe_load(config.read_text())
    assert {recorded[name]["class_path"].rpartition(".")[2] for name in ("model", "data", "trainer")} == {
        "OwnModule",
        "OwnData",
        "OwnTrainer",
    }
    assert recorded["seed_everything"] == 5
    (checkpoint,) = Path("runs").rglob("*.ckpt")
    assert OwnModule.load_from_checkpoint(checkpoint).factor == 2.0


def test_a_run_goes_on_from_its_last_checkpoint_and_tests_its_best(files, capsys) -> None:
    assert main(["fit", *files["run"]]) == 0
    assert main(["fit", *files["run"], "--steps", "3", "--ckpt_path", "last"]) == 0
    assert "goes on from step 2 of 3" in capsys.readouterr().err
    assert main(["test", *files["run"], "--ckpt_path", "best"]) == 0
    assert "held-in" in capsys.readouterr().out


def test_every_command_reads_the_config_that_a_fit_has_saved(files, capsys) -> None:
    assert main(["fit", *files["run"], "--out", "library/a", "--steps", "1"]) == 0
    (config,) = Path("runs").rglob("config.yaml")
    (checkpoint,) = Path("runs").rglob("*.ckpt")
    library = {file: file.read_bytes() for file in Path("library").rglob("*") if file.is_file()}
    assert main(["test", "--config", str(config), "--ckpt_path", str(checkpoint)]) == 0
    assert "held-in" in capsys.readouterr().out
    assert {file: file.read_bytes() for file in Path("library").rglob("*") if file.is_file()} == library
    assert main(["test", "--config", str(config), "--overwrite"]) == 2
    assert "there is no option --overwrite" in capsys.readouterr().err


def test_variables_of_the_environment_lie_beneath_config_files(files, settings, monkeypatch) -> None:
    monkeypatch.setenv("PL_FIT__TRAINER__MAX_STEPS", "7")
    monkeypatch.setenv("PL_FIT__MODEL__MODULES", "[v_proj, o_proj]")
    found = settings(*files["run"])
    assert (found["trainer"]["max_steps"], found["model"]["modules"]) == (2, ["q_proj"])


def test_a_profiler_reports(files, caplog) -> None:
    assert main(["fit", *files["run"], "--trainer.profiler", "simple"]) == 0
    assert "Profiler Report" in caplog.text


class OwnOptimizer(ExpertModule):
    """A module that makes its optimizer in Lightning's hook."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([tensor for tensor in self.parameters() if tensor.requires_grad], lr=0.1)


def test_a_module_may_configure_its_optimizers(files) -> None:
    assert main(["fit", *files["run"], "--model", f"{__name__}.OwnOptimizer", "--out", "library/a"]) == 0
    assert open_expert("library/a").record["hyperparameters"]["learning_rate"] == 0.1


def test_the_rate_falls_where_a_monitored_number_stays(files, caplog) -> None:
    words = ["--lr_scheduler", "ReduceLROnPlateau", "--lr_scheduler.monitor", "val_loss"]
    words += [
        "--lr_scheduler.patience",
        "0",
        "--lr_scheduler.threshold",
        "100.0",
        "--lr_scheduler.threshold_mode",
        "abs",
    ]
    words += ["--optimizer", "SGD", "--optimizer.lr", "0.5", "--data.batch_size", "12", "--steps", "4"]
    assert main(["fit", *files["run"], *words, "--trainer.callbacks+=LearningRateMonitor"]) == 0
    (metrics,) = Path("runs").rglob("metrics.csv")
    rates = [row["lr-SGD"] for row in csv.DictReader(metrics.open()) if row["lr-SGD"]]
    assert [float(rate) for rate in rates] == pytest.approx([0.5, 0.5, 0.05, 0.005])


def test_a_class_of_another_package_does_not_hide_an_optimizer_of_torch(files, settings) -> None:
    kind = type("SGD", (torch.optim.SGD,), {"__module__": __name__})
    assert kind in torch.optim.SGD.__subclasses__()
    Path("sgd.yaml").write_text("optimizer: {class_path: SGD, lr: 0.5}\n")
    for words in (["--optimizer", "SGD"], ["--config", "sgd.yaml"]):
        assert settings(*files["run"], *words)["model"]["optimizer"]["class_path"] == "torch.optim.SGD"


WRONG = [
    (["--lr_scheduler", "StepLR"], "--lr_scheduler.step_size must be given"),
    (["--optimizer.lr", "0.1"], "--optimizer.lr is a setting of a class; name the class before it, with --optimizer"),
    (["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor", "val_los"], "val_los"),
    (["--ckpt_path", "gone.ckpt"], "--ckpt_path gone.ckpt is not there; give a file that ends in .ckpt"),
]


@pytest.mark.parametrize(("words", "sentence"), WRONG)
def test_what_lightning_refuses_gets_a_sentence(files, capsys, words: list[str], sentence: str) -> None:
    assert main(["fit", *files["run"], *words]) in (1, 2)
    err = capsys.readouterr().err
    assert err.splitlines()[-1].startswith("error: ")
    assert sentence in err
    assert "Traceback" not in err


def test_unfreeze_trains_the_experts_alone(one_block: Path, task_files: dict[str, Path]) -> None:
    module = ExpertModule(one_block, ["q_proj"], LoRAExpert)
    data = TaskMixture([task_files["upper"]])
    quick = {"max_steps": 1, "accelerator": "cpu", "logger": False, "limit_val_batches": 0}
    Trainer(**quick).fit(module, data)
    trained = [name for name, tensor in module.named_parameters() if tensor.requires_grad]
    base = module.model.model.embed_tokens.weight.detach().clone()
    assert module.freeze().unfreeze() is module
    assert [name for name, tensor in module.named_parameters() if tensor.requires_grad] == trained
    Trainer(**quick | {"max_steps": 2}).fit(module, data)
    assert torch.equal(module.model.model.embed_tokens.weight, base)


def test_a_module_loads_its_own_tensors_and_names_others(one_block: Path, task_files: dict[str, Path]) -> None:
    module = ExpertModule(one_block, ["q_proj"], LoRAExpert)
    Trainer(max_steps=1, accelerator="cpu", logger=False, limit_val_batches=0).fit(
        module, TaskMixture([task_files["upper"]])
    )
    state = module.state_dict()
    assert not module.load_state_dict(state).missing_keys
    with pytest.raises(RuntimeError, match=r"tensors and these experts differ.*: other"):
        module.load_state_dict(state | {"other": torch.zeros(1)})


def test_untrained_experts_are_measured_with_a_warning(files, caplog) -> None:
    assert main(["validate", *files["run"]]) == 0
    assert "experts that nobody has trained; --ckpt_path takes" in caplog.text
    caplog.clear()
    assert main(["fit", *files["run"]]) == 0
    assert main(["validate", *files["run"], "--ckpt_path", "last"]) == 0
    assert "nobody has trained" not in caplog.text
