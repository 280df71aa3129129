"""ExpertModule: the loss, slim and strict checkpoints, applied experts, evaluation, and exact resume after SIGKILL."""

import json
import os
import signal
from functools import partial
from pathlib import Path

import conftest
import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from testbed import runs
from testbed.forked import ended, forked
from transformers import AutoModelForCausalLM

import modular_experts
from modular_experts.experts import FullExpert, LoRAExpert, MaskedExpert, SparseExpert
from modular_experts.injection import expert_layers
from modular_experts.library import open_expert
from modular_experts.masks import GrowAndDrop
from modular_experts.selection.mask_schedule import MaskSchedule
from modular_experts.training.estimate import measure_fit
from modular_experts.training.export_expert import ExportExpert
from modular_experts.training.learning_rate import Constant, WarmupCosine, WarmupLinear
from modular_experts.training.module import ExpertModule

KINDS = {
    "element": partial(SparseExpert, keep_ratio=0.1),
    "block": partial(SparseExpert, keep_ratio=0.3, granularity="block", block_size=8),
    "masked": partial(MaskedExpert, keep_ratio=0.1),
    "lora": partial(LoRAExpert, rank=2),
    "full": FullExpert,
}


def _batch(base: Path, files: dict[str, Path]) -> dict:
    data = runs.mixture(files, base)
    data.setup("fit")
    return next(iter(data.train_dataloader()))


def _numbers(module: ExpertModule, task: str) -> dict[str, float]:
    return {name: value for name, value in module.results["tasks"][task].items() if name != "role"}


def test_loss_is_the_mean_over_target_tokens_in_float64_arithmetic(tiny_llama_dir, task_files) -> None:
    module, batch = runs.module(tiny_llama_dir, None, dtype="float64"), _batch(tiny_llama_dir, task_files)
    module.configure_model()
    module.trainer = runs.trainer(tiny_llama_dir)
    total, count = 0.0, 0
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        length = int(mask.sum())
        logits = module.model(input_ids=ids[None, :length]).logits[0]
        for position in range(1, length):
            if labels[position] != -100:
                total += float(torch.logsumexp(logits[position - 1], 0) - logits[position - 1, labels[position]])
                count += 1
    assert count < int(batch["attention_mask"].sum())
    assert float(module.loss(batch)) == pytest.approx(total / count, rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_training_lowers_the_loss_and_export_and_checkpoint_test_like_the_trained_model(
    kind: str, fitted, tiny_llama_dir, task_files, tmp_path
) -> None:
    export = ExportExpert(str(tmp_path / "library"), "mine", monitor=None)
    module, trainer, losses = fitted(KINDS[kind], export, max_steps=12)
    trainer.save_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert kind == "masked" or sum(losses[-6:]) < sum(losses[:6])  # it hides nine tenths of its first training
    trainer.test(module, runs.mixture(task_files, tiny_llama_dir), verbose=False)
    applied = runs.module(tiny_llama_dir, None, applied=[str(export.target)])
    runs.trainer(tmp_path).test(applied, runs.mixture(task_files, tiny_llama_dir), verbose=False)
    for name, scores in module.results["tasks"].items():
        assert _numbers(applied, name) == pytest.approx(_numbers(module, name), rel=1e-5)
        assert scores["rows"] == 6
    fresh = runs.module(tiny_llama_dir, KINDS[kind])
    data = runs.mixture(task_files, tiny_llama_dir)
    runs.trainer(tmp_path / "fresh").test(fresh, data, ckpt_path=tmp_path / "a.ckpt", verbose=False)
    assert fresh.results["tasks"] == module.results["tasks"]
    results = json.loads((tmp_path / "results-2.json").read_text())  # of the second test
    assert {name: task["role"] for name, task in results["tasks"].items()} == {
        "upper": "held_in",
        "reverse": "held_in",
        "first": "held_out",
    }
    assert all(task["rows"] == 6 for task in results["tasks"].values())
    assert set(results["held_in"]) >= {"loss", "exact_match", "rougeL"}
    assert results["model"]["applied"][0]["name"] == "mine"


def test_an_expert_trained_on_top_of_another_adds_to_it(fitted, tiny_llama_dir, task_files, tmp_path, caplog):
    """The full expert reads its anchor again: base plus applied."""
    first = ExportExpert(str(tmp_path / "library"), "first", monitor=None)
    fitted(KINDS["element"], first)
    second = ExportExpert(str(tmp_path / "library"), "second", monitor=None)
    upper, trainer, _ = fitted(FullExpert, second, own={"applied": [str(first.target)]})
    trainer.test(upper, runs.mixture(task_files, tiny_llama_dir), verbose=False)
    both = runs.module(tiny_llama_dir, None, applied=[str(first.target), str(second.target)])
    runs.trainer(tmp_path).test(both, runs.mixture(task_files, tiny_llama_dir), verbose=False)
    assert _numbers(both, "upper") == pytest.approx(_numbers(upper, "upper"), rel=1e-5)
    record = json.loads((second.target / "expert.json").read_text())
    assert [parent["name"] for parent in record["parents"]] == ["first"]
    runs.module(tiny_llama_dir, None, applied=[str(first.target), str(second.target)]).configure_model()
    assert "trained on top" not in caplog.text
    runs.module(tiny_llama_dir, None, applied=[str(second.target)]).configure_model()
    assert "second was trained on top of first, which is not listed" in caplog.text


def test_a_checkpoint_holds_trained_tensors_alone_and_goes_into_no_other_base_or_experts(
    fitted, tiny, tmp_path
) -> None:
    module, trainer, _ = fitted(KINDS["element"], max_steps=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    stored = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert {name.rsplit(".", 1)[-1] for name in stored["state_dict"]} == {"values", "indices", "anchor"}
    moments = [v for s in stored["optimizer_states"][0]["state"].values() for v in s.values() if v.dim()]
    kept = sum(layer.expert.values.numel() for _, layer in expert_layers(module.model))
    assert sum(moment.numel() for moment in moments) == 2 * kept
    with pytest.raises(ValueError, match="trained on a base with fingerprint"):
        runs.module(tiny("llama", seed=1), KINDS["element"]).on_load_checkpoint(stored)
    for kind in ("lora", "block"):
        with pytest.raises(ValueError, match="experts are not those configured"):
            runs.module(tiny("llama"), KINDS[kind]).on_load_checkpoint(stored)


def test_a_checkpoint_goes_on_with_the_settings_and_on_top_of_the_experts_that_it_was_trained_with(
    fitted, tmp_path
) -> None:
    under = [ExportExpert(str(tmp_path / "library"), name, monitor=None) for name in ("one", "two")]
    for number, export in enumerate(under):
        fitted(KINDS["lora"], export, max_steps=1, seed=number)
    one, two = (str(export.target) for export in under)

    def run(path: Path | None, applied: list[str], expert=KINDS["lora"], rate: float = 1e-2) -> list[float]:
        own = {"applied": applied, "optimizer": partial(torch.optim.SGD, lr=rate)}
        _, trainer, losses = fitted(expert, own=own, ckpt=path, max_steps=2 if path else 1)
        if path is None:
            trainer.save_checkpoint(tmp_path / "a.ckpt")
        return losses

    run(None, [one])
    path = tmp_path / "a.ckpt"
    assert len(run(path, [one], rate=2e-2)) == 1
    assert len(run(path, [one], partial(LoRAExpert, rank=2, dropout=0))) == 1, "0 is 0.0"
    strong = (
        r"trained with LoRAExpert\(rank=2, scale=8.0, .*\), and LoRAExpert\(rank=2, scale=32.0, .*\) is set now; set"
    )
    with pytest.raises(ValueError, match=strong):
        run(path, [one], partial(LoRAExpert, rank=2, alpha=64.0))
    for applied, now in ([], ""), ([two], r"two \(\w{12}\)"), ([one, two], r"one .*, two .*"):
        with pytest.raises(
            ValueError, match=rf"with applied=\[one \(\w{{12}}\)\], and applied=\[{now}\] is set now; set"
        ):
            run(path, applied)
    old = torch.load(path, weights_only=True)
    torch.save({name: value for name, value in old.items() if name not in ("experts", "applied")}, path)
    assert len(run(path, [])) == 1
    run(None, [], Counting)
    assert len(run(path, [], Counting)) == 1


class Counting(LoRAExpert):
    """Counts its passes in a plain number."""

    calls = 0

    def forward(self, x, weight, bias):
        self.calls += 1
        return super().forward(x, weight, bias)


def _loaded(base: Path, **settings) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(base, **settings).eval()


def test_a_loaded_model_trains_like_its_directory(fitted, tiny_llama_dir, task_files, tmp_path) -> None:
    from_directory, _, losses = fitted(FullExpert, max_steps=3)
    export = ExportExpert(str(tmp_path / "library"), "mine", monitor=None)
    seed_everything(0, verbose=False)
    seen, optimizer = runs.Losses(), partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.0)
    module = ExpertModule(_loaded(tiny_llama_dir), runs.TARGET, FullExpert, optimizer=optimizer, max_new_tokens=6)
    trainer = runs.trainer(tmp_path, seen, export, max_steps=3, limit_val_batches=0)
    trainer.fit(module, runs.mixture(task_files, tiny_llama_dir))
    assert seen.steps == losses
    stored = open_expert(export.target)
    for name, delta in from_directory.task_vector():
        assert torch.equal(stored[name].dense(), delta.dense())
    assert stored.record["base"] == {
        "id": str(tiny_llama_dir),
        "revision": None,
        "fingerprint": from_directory.fingerprint,
        "rows": 99,
    }


def test_a_model_that_is_not_its_base_is_refused(tiny_llama_dir) -> None:
    model = _loaded(tiny_llama_dir, dtype=torch.bfloat16)
    module = ExpertModule(model, "q_proj", FullExpert)
    module.configure_model()
    assert module.dtype_name == "bfloat16"
    model = _loaded(tiny_llama_dir, dtype=torch.bfloat16)
    with torch.no_grad():
        model.get_parameter("model.norm.weight")[0] += 1
    with pytest.raises(ValueError, match=r"model\.norm\.weight of the model is not that of its base"):
        ExpertModule(model, "q_proj", FullExpert).configure_model()
    with pytest.raises(ValueError, match="does not name its directory"):
        ExpertModule(conftest.build_model("llama"), "q_proj", FullExpert).configure_model()


def test_a_model_that_holds_experts_gets_no_others_and_loses_nothing(tiny_llama_dir, task_files, tmp_path) -> None:
    """As when a cell of a notebook runs twice."""
    model = _loaded(tiny_llama_dir)
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = ExpertModule(model, "q_proj", KINDS["element"])

    def fit(module: ExpertModule) -> None:
        trainer = runs.trainer(tmp_path, max_steps=1, limit_val_batches=0)
        trainer.fit(module, runs.mixture(task_files, tiny_llama_dir))

    fit(first)
    trained = {name: delta.dense().clone() for name, delta in first.task_vector()}
    again = ExpertModule(model, "q_proj", KINDS["element"])
    with pytest.raises(
        ValueError, match=r"the model holds 2 experts already; fit .*, or take them out with modular_experts\.eject"
    ):
        fit(again)
    assert all(torch.equal(delta.dense(), trained[name]) for name, delta in first.task_vector())
    fit(first)
    modular_experts.eject(model)
    assert all(torch.equal(tensor, plain[name]) for name, tensor in model.state_dict().items())
    fit(again)


def test_a_fit_after_the_test_of_a_checkpoint_draws_random_numbers_of_its_own(
    fitted, tiny_llama_dir, task_files, tmp_path
):
    dropout = partial(LoRAExpert, rank=2, dropout=0.5)
    _, trainer, _ = fitted(dropout, max_steps=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    found = []
    for seed in (1, 2):
        module, losses = runs.module(tiny_llama_dir, dropout), runs.Losses()
        data = runs.mixture(task_files, tiny_llama_dir)
        runs.trainer(tmp_path).validate(module, data, ckpt_path=tmp_path / "a.ckpt", verbose=False)
        torch.manual_seed(seed)
        runs.trainer(tmp_path, losses, max_steps=1, limit_val_batches=0).fit(module, data)
        found.append(losses.steps)
    assert found[0] != found[1]


class Penalised(LoRAExpert):
    """Pulls its factors to zero."""

    def extra_loss(self) -> dict[str, torch.Tensor]:
        return {"size": 0.5 * self.up.square().sum()}


def test_penalties_join_the_loss_and_are_logged_by_name(fitted, tiny_llama_dir, task_files) -> None:
    module, trainer, losses = fitted(partial(Penalised, rank=2), max_steps=3)
    assert trainer.logged_metrics["penalty/size"] > 0
    batch = _batch(tiny_llama_dir, task_files)
    experts = [layer.expert for _, layer in expert_layers(module.model)]
    both = module.loss(batch).item()
    for expert in experts:
        expert.__class__ = LoRAExpert
    wanted = sum(0.5 * expert.up.square().sum().item() for expert in experts)
    assert both - module.loss(batch).item() == pytest.approx(wanted, rel=1e-3)
    _, plain, others = fitted(KINDS["lora"], max_steps=3)
    assert not [name for name in plain.logged_metrics if name.startswith("penalty")]
    assert losses[0] == others[0], "the factors start at zero"
    assert losses[-1] != others[-1]


@pytest.mark.parametrize(("kind", "precision"), [*zip(KINDS, ["32-true", "bf16-mixed"] * len(KINDS), strict=False)])
def test_trained_values_are_float32_beside_a_bfloat16_base(kind, precision, fitted):
    """And a rate at which nothing moves leaves no rounding of the base in the delta."""
    own = {"optimizer": None, "dtype": "bfloat16", "learning_rate": 1e-12}
    module, *_ = fitted(KINDS[kind], own=own, max_steps=2, precision=precision)
    assert {p.dtype for p in module.parameters() if p.requires_grad} == {torch.float32}
    largest = max(float(delta.dense().abs().max()) for _, delta in module.task_vector())
    assert largest == 0 if kind == "full" else 0 < largest < 1e-11


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
@pytest.mark.parametrize("use", ["fit", "test", "estimate"])
def test_a_precision_that_rounds_trained_values_is_refused_before_the_model_is_loaded(
    use: str, precision: str, tiny_llama_dir, task_files, tmp_path
) -> None:
    module, trainer = runs.module(tiny_llama_dir, FullExpert), runs.trainer(tmp_path, precision=precision)
    uses = {
        "fit": lambda data: trainer.fit(module, data),
        "test": lambda data: trainer.test(module, data),
        "estimate": lambda data: measure_fit(module, data, trainer),
    }
    data = runs.mixture(task_files, tiny_llama_dir)
    with pytest.raises(ValueError, match=rf"precision={precision} .*give `dtype=.bfloat16.` .*bf16-mixed"):
        uses[use](data)
    assert not hasattr(module, "model")
    data.setup("fit")
    assert len(list(data.train_dataloader())) == 6


def test_length_is_that_of_the_fit(fitted) -> None:
    """Six batches an epoch."""
    wanted = [
        ({"max_steps": 7}, (6, 7)),
        ({"max_steps": -1, "max_epochs": 3}, (6, 18)),
        ({"max_steps": 7, "max_epochs": 1}, (6, 6)),
        ({"max_steps": -1, "max_epochs": 3, "accumulate_grad_batches": 4}, (2, 6)),
        ({"max_steps": -1, "max_epochs": 2, "limit_train_batches": 2}, (2, 4)),
        ({"max_steps": -1, "max_epochs": 2, "limit_train_batches": 0.5}, (3, 6)),
    ]
    for settings, (per_epoch, total) in wanted:
        module, trainer, _ = fitted(KINDS["lora"], own={"scheduler": Constant()}, **settings)
        assert (module.length.steps_per_epoch, module.length.total_steps) == (per_epoch, total)
        assert trainer.global_step == total


def test_learning_rate_shapes_rise_and_fall() -> None:
    linear, cosine = WarmupLinear(0.2), WarmupCosine(0.2)
    assert [round(linear.factor(step, 10), 3) for step in range(11)] == [
        *(0.333, 0.667),
        *(1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0.0),
    ]
    assert cosine.factor(6, 10) == pytest.approx(0.5)
    assert [Constant().factor(step, 10) for step in (0, 5, 10)] == [1.0, 1.0, 1.0]
    with pytest.raises(ValueError, match=r"warmup=1.0, .* is outside \[0, 1\)"):
        WarmupLinear(1.0)


@pytest.mark.parametrize(
    ("settings", "set_later", "rate"),
    [
        ({"scheduler": partial(torch.optim.lr_scheduler.StepLR, step_size=2)}, None, LoRAExpert.learning_rate),
        ({"learning_rate": 0.03}, None, 0.03),
        # Lightning's finder of learning rates sets the attribute, before the optimizer is made.
        ({"optimizer": partial(torch.optim.SGD, lr=1.0)}, 0.5, 0.5),
    ],
    ids=["of the kind, beside any scheduler of torch", "given", "found, for any optimizer"],
)
def test_a_learning_rate_is_the_peak_of_the_optimizer_and_is_logged(
    settings, set_later, rate, tiny_llama_dir, task_files, tmp_path, caplog
) -> None:
    caplog.set_level("INFO", "modular_experts")
    module = runs.module(tiny_llama_dir, KINDS["lora"], **settings)
    module.learning_rate = set_later or module.learning_rate
    trainer = runs.trainer(tmp_path, max_steps=6, accumulate_grad_batches=2, limit_val_batches=0)
    trainer.fit(module, runs.mixture(task_files, tiny_llama_dir))
    (group,) = trainer.optimizers[0].param_groups
    assert (group["initial_lr"], group["weight_decay"]) == (rate, 0.0)
    if "scheduler" in settings:
        assert group["lr"] == pytest.approx(rate * 0.001)
    else:
        assert module.record_facts()["hyperparameters"]["learning_rate"] == rate
        assert f"learning rate {rate}, batch size 4 x 2 accumulated, 6 steps (2 epochs)" in caplog.text


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_fused_step_of_the_default_optimizer_is_that_of_plain_adamw(architecture, tiny, task_files, tmp_path):
    """GPT-2 lays its weights out transposed, and a fused step passes over bare memory."""
    base, found = tiny(architecture), []
    how = {"max_steps": 5, "gradient_clip_val": 0.5, "accumulate_grad_batches": 2, "limit_val_batches": 0}
    for optimizer in (None, partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.0)):
        own = {"modules": "all-linear", "optimizer": optimizer, "learning_rate": None if optimizer else 1e-3}
        _, trainer, losses = runs.fit(base, task_files, tmp_path, FullExpert, own=own, **how)
        assert (trainer.optimizers[0].param_groups[0]["fused"] is True) == (optimizer is None)
        found.append(losses)
    assert found[0][-1] < found[0][0]
    assert found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_the_default_optimizer_clips_in_mixed_precision(precision, fitted) -> None:
    """Lightning refuses to clip where an optimizer undoes the scale of gradients itself, as a fused one does."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8) if precision == "16-mixed" else None
    how = {"gradient_clip_val": 0.5, "plugins": [MixedPrecision(precision, "cpu", scaler)]}
    _, trainer, _ = fitted(KINDS["lora"], own={"optimizer": None}, max_steps=2, **how)
    assert trainer.global_step == 2
    assert not trainer.optimizers[0].param_groups[0]["fused"]


def test_an_expert_in_another_use_than_its_training_is_warned_of(fitted, tiny_llama_dir, task_files, tmp_path, caplog):
    export = ExportExpert(str(tmp_path / "library"), "mine", monitor=None)
    fitted(KINDS["element"], export, max_steps=1)

    def use(**settings) -> list[str]:
        caplog.clear()
        dtype = settings.pop("dtype", "float32")
        module = runs.module(tiny_llama_dir, None, applied=[str(export.target)], dtype=dtype, max_new_tokens=1)
        runs.trainer(tmp_path).predict(module, runs.mixture(task_files, tiny_llama_dir, **settings))
        return [message for message in caplog.messages if "otherwise than" in message]

    assert not use()
    (said,) = use(max_length=100, dtype="bfloat16")
    assert said == (
        "mine is used otherwise than it was trained, with 100 instead of 1024 tokens a row (`max_length=`), a base "
        "in bfloat16 instead of float32 (`dtype=`)"
    )


def both(weight: torch.Tensor) -> SparseExpert | LoRAExpert:
    """Make sparse experts of square weights, and LoRA with dropout of the others."""
    if weight.shape[0] == weight.shape[1]:
        return SparseExpert(weight, keep_ratio=0.2)
    return LoRAExpert(weight, rank=2, dropout=0.3)


def resumable(base: Path, files: dict[str, Path], folder: Path, ckpt: Path | None, kill_at: int | None) -> list[float]:
    """Train 10 steps (an epoch is six) with dropout beside a moving mask; return the losses of this process."""

    class Kill(runs.Losses):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            if trainer.global_step == kill_at:
                (folder / "losses.json").write_text(json.dumps(self.steps))
                os.kill(os.getpid(), signal.SIGKILL)

    losses = Kill()
    torch.manual_seed(0)
    optimizer = partial(torch.optim.AdamW, lr=1e-2)
    module = runs.module(base, both, optimizer=optimizer, gradient_checkpointing=None)
    schedule = MaskSchedule(rule=GrowAndDrop(every=3, until=0.9, replace=0.4))
    saving = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=1, filename="last", enable_version_counter=False)
    run = runs.trainer(folder, losses, schedule, saving, max_steps=10, enable_checkpointing=True)
    torch.manual_seed(5 if ckpt is None else 77)
    run.fit(module, runs.mixture(files, base), ckpt_path=ckpt)
    return losses.steps


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_run_killed_in_mid_epoch_resumes_with_the_same_losses(tiny_llama_dir, task_files, tmp_path) -> None:
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole = resumable(tiny_llama_dir, task_files, tmp_path / "whole", None, None)
    child = forked(resumable, tiny_llama_dir, task_files, tmp_path / "killed", None, 8)
    assert ended(child) == -signal.SIGKILL
    before = json.loads((tmp_path / "killed" / "losses.json").read_text())
    checkpoint = tmp_path / "killed" / "last.ckpt"
    after = resumable(tiny_llama_dir, task_files, tmp_path / "killed", checkpoint, None)
    assert len(before) == 8
    assert before + after == whole


@pytest.mark.parametrize("precision", ["32-true", "64-true"])
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_run_resumed_from_the_end_of_an_epoch_has_the_same_losses(precision, fit_tiny, tmp_path):
    """Validations fall between the ends of epochs."""

    def run(folder: Path, steps: int, ckpt: Path | None = None) -> list[float]:
        saving = ModelCheckpoint(folder, save_top_k=-1, filename="{step}", save_on_train_epoch_end=True)
        schedule = MaskSchedule(rule=GrowAndDrop(every=3, until=0.9))
        how = {"own": {"scheduler": Constant()}, "enable_checkpointing": True, "precision": precision}
        return fit_tiny(KINDS["element"], saving, schedule, ckpt=ckpt, max_steps=steps, **how)[2]

    whole = run(tmp_path / "whole", 14)
    for step in (6, 12):  # an epoch is six
        assert run(tmp_path / f"from{step}", 14, tmp_path / "whole" / f"step={step}.ckpt") == whole[step:]
