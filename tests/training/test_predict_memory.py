"""A fit whose memory is predicted from shapes takes this memory with numbers."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import build_tokenizer
from testbed.runs import TARGET, mixture, module, trainer
from transformers import AutoModelForCausalLM, FalconConfig

from modular_experts import estimate_fit
from modular_experts.base.files import fingerprint
from modular_experts.base.structure import _computes_linear
from modular_experts.data import TaskMixture
from modular_experts.deltas import Dense
from modular_experts.evaluation import batch_losses
from modular_experts.experts import FullExpert, LoRAExpert, MaskedExpert, SparseExpert
from modular_experts.library import make_record, write_expert
from modular_experts.merging.route import route
from modular_experts.routing import Energy
from modular_experts.training.estimate import measure_fit
from modular_experts.training.predict_memory import LiveBytes, native_plans, predict

QUIET = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
KINDS = {
    "sparse": SparseExpert,
    "tiles": partial(SparseExpert, granularity="block", block_size=4),
    "lora": LoRAExpert,
    "full": FullExpert,
    "masked": MaskedExpert,
}


def peaks(base, kind, data, run, **settings) -> tuple[int, int]:
    """Return what two steps hold at once, as shapes predict it and with numbers, without the process itself."""
    shapes, real = module(base, KINDS[kind], **settings), module(base, KINDS[kind], **settings)
    parts = predict(shapes, data, run).bytes
    real.trainer = run
    real.setup("fit")
    real.configure_model()
    batch = max(data.train_dataloader(), key=lambda batch: batch["input_ids"].numel())
    optimizer = real.make_optimizer()
    real.model.train()
    with LiveBytes() as live:
        for one in [*real.model.parameters(), *real.model.buffers()]:
            live.count(one)
        for _ in range(2):
            loss = batch_losses(real.model, batch)[0].sum()
            optimizer.zero_grad()
            loss.backward()
            del loss
            optimizer.step()
    freed = parts["trained numbers and gradients"] / 2
    return sum(parts.values()) - parts["Python and its libraries"] - freed, live.most


@pytest.mark.parametrize(
    ("kind", "settings", "apart"),
    [
        *((kind, {}, 0.02) for kind in KINDS),
        # In a base of two small blocks, the one that is computed again is half of all.
        ("tiles", {"gradient_checkpointing": True}, 0.3),
        ("tiles", {"values": "bfloat16"}, 0.02),
        ("tiles", {"quantise": "nf4"}, 0.05),
        ("lora", {"quantise": "int8"}, 0.05),
    ],
)
def test_the_peak_is_that_of_steps_with_numbers(kind, settings, apart, tiny_llama_dir, task_files, tmp_path) -> None:
    if "quantise" in settings:
        pytest.importorskip("bitsandbytes")
    data = mixture(task_files, tiny_llama_dir, packing=False)
    found, wanted = peaks(tiny_llama_dir, kind, data, trainer(tmp_path), **settings)
    assert found == pytest.approx(wanted, rel=apart)


@pytest.mark.parametrize(("kind", "modules"), [("tiles", "all-linear"), ("lora", "q_proj")])
def test_tokens_of_a_mixture_are_spread_evenly(kind, modules, tiny, task_files, tmp_path) -> None:
    data = mixture(task_files, tiny("mixtral"), packing=False)
    found, wanted = peaks(tiny("mixtral"), kind, data, trainer(tmp_path), modules=modules)
    # Where no matrix has an expert, the base multiplies all of a layer at once.
    assert found == pytest.approx(wanted, rel=0.05 if modules == "all-linear" else 0.15)


def test_plans_of_native_kernels_and_the_rest_are_counted_as_by_steps(one_block, task_files, tmp_path) -> None:
    found, kind = [], partial(SparseExpert, keep_ratio=0.5)
    for tell in (predict, measure_fit):
        told = module(one_block, kind)
        found.append(tell(told, mixture(task_files, one_block), trainer(tmp_path, max_steps=14)))
        if tell is predict:
            # A layer of 32 x 32 and one of 32 x 48, half of their entries.
            assert native_plans(told.model) == 4 * (32 * 32 + 32 * 48)
    shapes, steps = found
    for name in ("splits", "padding", "weights", "rates", "length", "choices", "validations", "places"):
        assert getattr(shapes, name) == getattr(steps, name), name
    for name in ("base", "trained numbers and gradients", "optimizer state"):
        assert shapes.bytes[name] == steps.bytes[name], name
    assert (shapes.predicted, steps.predicted) == (True, False)
    assert (shapes.seconds, sum(shapes.bytes.values())) == ({}, shapes.peak)


@pytest.fixture
def settings(one_block, task_files) -> dict:
    """A fit that each change makes smaller, in a process that takes nothing."""
    kind = partial(SparseExpert, keep_ratio=0.5)
    how = {"base": str(one_block), "tasks": [str(task_files["upper"])], "expert": kind, "modules": TARGET}
    return how | {"steps": 4, "batch_size": 12, "trainer": QUIET, "data": {"packing": False}}


@pytest.fixture(autouse=True)
def _alone(monkeypatch) -> None:
    monkeypatch.setattr("modular_experts.training.predict_memory.high_water", lambda device: 0)


@pytest.fixture
def experts_routed(one_block, tmp_path) -> str:
    """The directory of a routed expert."""
    base = {"id": str(one_block), "revision": None, "fingerprint": fingerprint(one_block)}
    places = [tmp_path / "library" / name for name in "ab"]
    for place in places:
        deltas = {"model.layers.0.self_attn.q_proj.weight": Dense(torch.ones(32, 32))}
        write_expert(place, deltas, make_record("made", base))
    return str(route(places, tmp_path / "library" / "routed", Energy()).path)


CHANGES = [
    {"model.gradient_checkpointing": True},
    {"data.batch_size": 3, "trainer.accumulate_grad_batches": 4},
    {"model.dtype": "bfloat16", "trainer.precision": "bf16-mixed"},
    {"model.values": "bfloat16"},
]


def test_changes_come_cheapest_first_until_it_fits(settings) -> None:
    """Smaller batches, too, of a mixture of one's own, which stays as it is."""
    mine, smaller = (TaskMixture(settings["tasks"], packing=False, batch_size=rows) for rows in (12, 3))
    how = {name: what for name, what in settings.items() if name not in ("data", "batch_size")}
    whole = estimate_fit(**how | {"tasks": mine}, fit_into="1GB")
    assert (whole.predicted, whole.changes) == (True, [])
    changed = {"model": {"gradient_checkpointing": True, "dtype": "bfloat16", "values": "bfloat16"}, "tasks": smaller}
    changed["trainer"] = QUIET | {"accumulate_grad_batches": 4, "precision": "bf16-mixed"}
    least = estimate_fit(**how | changed, fit_into="1GB").peak
    found = estimate_fit(**how | {"tasks": mine}, fit_into=least)
    assert [change.settings for change in found.changes] == CHANGES
    peaks = [found.peak, *(change.peak for change in found.changes)]
    assert peaks == sorted(peaks, reverse=True)
    assert (peaks[0], peaks[-1]) == (whole.peak, least), "a changed fit takes what was said"
    assert mine.batch_size == 12
    model = changed["model"] | {"values": "float32"}
    with pytest.raises(
        ValueError, match=r"nothing makes this fit take at most .* kB: it takes .* `model.values=.bfloat16.`;"
    ):
        estimate_fit(**how | changed | {"model": model}, fit_into=least - 1)


def test_a_prediction_is_for_one_of_the_processes(one_block, task_files, tmp_path) -> None:
    found = []
    for rows, place in ((12, {"devices": 2, "strategy": "ddp"}), (12, {}), (6, {})):
        data = mixture({"upper": task_files["upper"]}, one_block, packing=False, batch_size=rows)
        found.append(predict(module(one_block, LoRAExpert), data, trainer(tmp_path, **place)).peak)
    assert found[0] == found[2] < found[1]


def test_what_shapes_do_not_tell_is_refused(settings, experts_routed, tmp_path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(settings["base"])
    config = json.loads((Path(settings["base"]) / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    shutil.copytree(settings["base"], tmp_path / "gptq")
    (tmp_path / "gptq" / "config.json").write_text(json.dumps(config))
    for changed, sentence in (
        ({"base": loaded}, "shapes predict what a fit takes on a base on disk; give its directory"),
        (
            {"model": {"applied": [experts_routed]}},
            "a fit on top of a routed expert cannot be predicted; a dry run wit",
        ),
        ({"base": str(tmp_path / "gptq")}, "on a base that another library than bitsandbytes quantises cannot be pred"),
        ({"quantise": "int8-torchao"}, "another library than bitsandbytes"),
    ):
        with pytest.raises(ValueError, match=sentence):
            estimate_fit(**settings | changed, fit_into="1GB")
    with pytest.raises(ValueError, match="an estimate has one process, and shard_base needs several; leave shard_base"):
        estimate_fit(**settings, model={"shard_base": True})


def test_a_base_of_more_than_half_of_the_free_memory_is_not_loaded(settings, monkeypatch) -> None:
    assert not estimate_fit(**settings).predicted
    monkeypatch.setattr("modular_experts.training.activations.free_memory", lambda: 2**16)
    assert estimate_fit(**settings).predicted


def test_layers_that_compute_a_linear_one_stay_known(task_files, tmp_path) -> None:
    _computes_linear.cache_clear()
    config = FalconConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=1, vocab_size=128)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "falcon")
    build_tokenizer().save_pretrained(tmp_path / "falcon")
    shapes = module(tmp_path / "falcon", LoRAExpert, modules="all-linear")
    assert len(predict(shapes, mixture(task_files, tmp_path / "falcon"), trainer(tmp_path)).weights) == 4
