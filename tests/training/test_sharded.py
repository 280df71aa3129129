"""Processes that share the base between them train what one trains that holds all of it."""

import warnings
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import build_model
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from testbed import runs, sharded_run
from testbed.forked import ended, run_on_two_ranks, start_ranks

from modular_experts.deltas import Dense
from modular_experts.experts import LoRAExpert, MaskedExpert, SparseExpert
from modular_experts.injection import inject
from modular_experts.injection.sharded import shard

pytestmark = pytest.mark.ddp


@pytest.fixture(scope="module")
def found(tmp_path_factory, tiny, task_files) -> tuple[dict, list[dict]]:
    """What one process, this one, and two processes end with."""
    folder = tmp_path_factory.mktemp("sharded")
    places = {name: folder / name for name in ("one", "two", "last")}
    for place in places.values():
        place.mkdir()
    load = lambda name, rank=0: torch.load(places[name] / f"rank{rank}.pt", weights_only=True)  # noqa: E731
    several = tiny("llama"), tiny("llama", **sharded_run.WIDE), tiny("gemma2"), tiny("mixtral"), task_files
    with warnings.catch_warnings():
        sharded_run.main(places["one"], *several, 1)
    run_on_two_ranks(sharded_run.main, places["two"], *several, 2)
    begun = places["two"] / "entries-step=2.ckpt"
    with warnings.catch_warnings():
        sharded_run.resume(places["last"], tiny("llama"), task_files, 1, begun)
    one, two = load("one"), [load("two", rank) for rank in range(2)]
    two[0] |= {"one again": load("last")["resumed"]}
    return one, two


TRAINED = {name: (name, 1e-6, 1e-9) for name in [*sharded_run.KINDS, "clipped", "resumed", "on top", "tied"]}
# What computes in float32.
TRAINED |= {f"quantised in {form}": (form, 1e-5, 1e-6) for form in sharded_run.QUANTISED}
TRAINED["attention beside the parted matrices of a mixture"] = ("of a mixture", 1e-5, 1e-6)
MATRICES = {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}
OTHERS = {"embed_tokens", "input_layernorm", "post_attention_layernorm", "norm", "lm_head"}


@pytest.mark.parametrize(("name", "rtol", "atol"), TRAINED.values(), ids=TRAINED)
def test_two_processes_train_what_one_trains(found, name: str, rtol: float, atol: float) -> None:
    one, two = found
    assert max(values.abs().max() for values in one[name].values() if values.is_floating_point()) > 1e-3
    for rank in two:
        torch.testing.assert_close(rank[name], one[name], rtol=rtol, atol=atol)


def test_one_goes_on_from_two_and_one_exports(found) -> None:
    one, (rank, _) = found
    torch.testing.assert_close(rank["one again"], one["entries"], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(rank["moved"], one["moved"], rtol=1e-6, atol=1e-7)  # deltas are float32


def test_an_error_in_one_process_ends_the_other(tmp_path, tiny_llama_dir, task_files, capfd) -> None:
    ranks = start_ranks(sharded_run.break_one, tmp_path, tiny_llama_dir, task_files)
    assert [ended(rank, 60) for rank in ranks] == [1, 1]
    assert "ValueError: the pass broke" in capfd.readouterr().err


def test_each_process_holds_a_part_of_a_plain_and_of_a_quantised_base_and_exports_one_expert(found) -> None:
    one, two = found
    for rank in two:
        assert rank["held"] < 0.6 * one["held"]
        assert rank["hashes"] == two[0]["hashes"]
        for form in sharded_run.QUANTISED:
            packed = set() if form == "int8" else {"down_proj"}  # whose blocks of 64 numbers go on in the next row
            assert set(rank[f"parted {form}"]) == MATRICES - packed | OTHERS


def test_what_a_sharded_base_cannot_do_ends_with_its_reason(found) -> None:
    others, passed, prompts = found[1][1]["refusals"]
    assert "writes others into weights, of which each process holds a part" in others
    assert passed == "the pass broke"
    assert "a router that reads prompts runs a part of the model" in prompts


def test_processes_with_other_numbers_of_passes_wait_for_each_other(found) -> None:
    one, two = (found[0]["scores"], [rank["scores"] for rank in found[1]])
    assert one["validate"][0]["val_loss"] > one["fit"]["val_loss"]
    answers = [two[number % 2]["answers"][number // 2] for number in range(len(one["answers"]))]
    assert answers == one["answers"]
    for rank in two:
        assert rank["validate"][0] == pytest.approx(one["validate"][0], rel=1e-9)
        assert rank["fit"] == pytest.approx(one["fit"], rel=1e-9)


class Gain(LoRAExpert):
    """Makes its delta of the weight, and does not say so."""

    def delta(self, weight, anchor):
        return Dense(weight * (self.up @ self.down))


@pytest.mark.parametrize(
    ("architecture", "kind", "modules", "sentence"),
    [
        ("llama", MaskedExpert, "q_proj", r"needs model\.layers\.0.* whole, .* take a sparse or low-rank"),
        ("llama", partial(Gain, rank=2), "q_proj", r"needs model\.layers\.0.* whole, .* take a sparse or low-rank"),
        ("gpt2", SparseExpert, "c_attn", r"SparseExpert needs .*c_attn.* whole, .*; take a low-rank expert for this"),
        ("mixtral", LoRAExpert, "down_proj", r"LoRAExpert needs model\.layers\.0.*down_proj\[0\] whole"),
    ],
)
def test_an_expert_that_needs_the_weight_whole_is_refused(architecture, kind, modules, sentence) -> None:
    model = build_model(architecture)
    inject(model, kind, modules)
    with pytest.raises(ValueError, match=sentence):
        shard(model, torch.device("cpu"))


def test_one_process_is_refused(tmp_path, tiny_llama_dir, task_files) -> None:
    module = runs.module(tiny_llama_dir, SparseExpert, shard_base=True)
    with pytest.raises(ValueError, match="shard_base needs several processes"):
        runs.trainer(tmp_path).fit(module, runs.mixture(task_files, tiny_llama_dir))


@pytest.mark.parametrize("kind", [ModelParallelStrategy, FSDPStrategy, DeepSpeedStrategy])
def test_strategies_that_part_what_is_trained_are_refused(kind, tiny_llama_dir) -> None:
    module = runs.module(tiny_llama_dir, SparseExpert)
    # Made without what it needs to start: several processes, a GPU, a package.
    module._trainer = SimpleNamespace(strategy=kind.__new__(kind))
    with pytest.raises(ValueError, match=rf"{kind.__name__} is not supported: .* take trainer\.strategy=ddp"):
        module.setup("fit")
