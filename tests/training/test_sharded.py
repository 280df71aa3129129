"""Processes that share the base between them train what one trains that holds all of it."""

import warnings

import pytest
import torch
from conftest import build_model
from testbed import runs, sharded_run
from testbed.forked import run_on_two_ranks

from modular_experts.experts import FullExpert, SparseExpert
from modular_experts.injection import inject
from modular_experts.injection.sharded import shard

pytestmark = pytest.mark.ddp


@pytest.fixture(scope="module")
def found(tmp_path_factory, tiny_llama_dir, task_files) -> tuple[dict, list[dict]]:
    """What one process, this one, and two processes end with."""
    folder = tmp_path_factory.mktemp("sharded")
    places = folder / "one", folder / "two"
    for place in places:
        place.mkdir()
    with warnings.catch_warnings():
        sharded_run.main(places[0], tiny_llama_dir, task_files, 1)
    run_on_two_ranks(sharded_run.main, places[1], tiny_llama_dir, task_files, 2)
    load = lambda file: torch.load(file, weights_only=True)  # noqa: E731
    return load(places[0] / "rank0.pt"), [load(places[1] / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("kind", sharded_run.KINDS)
@pytest.mark.parametrize("part", [*sharded_run.PARTS, "resumed"])
def test_two_processes_train_what_one_trains(found, kind: str, part: str) -> None:
    one, two = found
    name = f"{kind} {part}"
    assert max(values.abs().max() for values in one[name].values() if values.is_floating_point()) > 1e-3
    for rank in two:
        torch.testing.assert_close(rank[name], one[name], rtol=1e-6, atol=1e-9)


def test_each_process_holds_a_part_of_the_base_and_exports_one_expert(found) -> None:
    one, two = found
    for rank in two:
        assert rank["held"] < 0.6 * one["held"]
        assert all(rank[f"{kind} hash"] == two[0][f"{kind} hash"] for kind in sharded_run.KINDS)


def test_an_expert_that_writes_into_the_weight_is_refused() -> None:
    model = build_model("llama")
    inject(model, FullExpert, "q_proj")
    with pytest.raises(ValueError, match=r"FullExpert writes into model\.layers\.0.* take a sparse or low-rank"):
        shard(model, torch.device("cpu"))


def test_one_process_and_answers_are_refused(tmp_path, tiny_llama_dir, task_files) -> None:
    module = runs.module(tiny_llama_dir, SparseExpert, shard_base=True)
    with pytest.raises(ValueError, match="shard_base needs several processes"):
        runs.trainer(tmp_path).fit(module, runs.mixture(task_files, tiny_llama_dir))
    with pytest.raises(ValueError, match="shard_base is for fit and validate"):
        runs.trainer(tmp_path).test(module, runs.mixture(task_files, tiny_llama_dir))
