"""Rows that are longer than a model's context lose their start wherever a model reads them, as with a max_length."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_rows
from testbed import runs

from modular_experts import Base, ExpertModule, LoRAExpert, TaskMixture, evaluate
from modular_experts.library import open_expert
from modular_experts.merging.objective import ValidationRows
from modular_experts.merging.statistics import take_statistics
from modular_experts.merging.tune import tune
from modular_experts.methods import TaskArithmetic
from modular_experts.training.estimate import measure_fit
from modular_experts.training.export_expert import ExportExpert

CONTEXT = 40
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*")  # Lightning 2.6.6 meets torch 2.13


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def base(request, tiny: Callable[..., Path]) -> Path:
    return tiny(request.param, max_position_embeddings=CONTEXT)


@pytest.fixture
def read(base: Path, tmp_path: Path) -> Callable[..., TaskMixture]:
    """A mixture of one task whose rows have 50 to 60 tokens, but one that fits each split."""
    splits = ["train", "validation", "test"]
    rows = [{"input": "abcdefghij" * 5 + "k" * row, "target": "yes", "split": splits[row % 3]} for row in range(6)]
    rows += [{"input": "short", "target": "no", "split": split} for split in splits]
    path = write_rows(tmp_path / "t.jsonl", rows)
    tokenizer = Base.open(base).tokenizer()
    return lambda **settings: TaskMixture([str(path)], tokenizer, batch_size=3, packing=False, **settings)


def test_every_command_does_what_it_does_with_max_length_at_the_context(base, read, tmp_path, caplog) -> None:
    caplog.set_level(logging.WARNING)
    found = []
    for name, settings in (("context", {}), ("max_length", {"max_length": CONTEXT})):
        data, library = read(**settings), tmp_path / name
        torch.manual_seed(0)
        module = ExpertModule(str(base), modules="all-linear", expert=LoRAExpert, learning_rate=0.01)
        trainer = runs.trainer(library, ExportExpert(str(library), "t"), max_steps=2)
        trainer.fit(module, data)
        trainer.test(module, data, verbose=False)
        found.append((open_expert(tmp_path / name / "t").content_hash, module.results["tasks"]))
    assert found[0] == found[1]
    said = {record.getMessage() for record in caplog.records}
    for split in ("train", "validation", "test"):
        for limit in ("the base's context of 40 tokens", "max_length=40"):
            assert f"t: 2 of 3 {split} rows are longer than {limit} and lost their start" in said
    place = tmp_path / "context" / "t"
    expert = open_expert(place)

    def measured(**settings: Any) -> list[Any]:
        rows = [ValidationRows(read(**settings), labels=labels) for labels in ("rows", "experts")]
        tuned = [tune([expert], TaskArithmetic(), some, grid={"scale": [0.5]}).trials for some in rows]
        (fisher,) = take_statistics([place], "fisher", read(**settings), overwrite=True)
        module = ExpertModule(str(base), modules="c_attn|q_proj", expert=LoRAExpert)
        steps = measure_fit(module, read(**settings), runs.trainer(tmp_path, max_steps=2))
        return [evaluate(base, place, read(**settings)).rows, *tuned, fisher.facts["data"]["tokens"], steps.splits]

    assert str(measured()) == str(measured(max_length=CONTEXT))


def test_a_mixture_follows_the_context_of_the_model_that_reads_it(read) -> None:
    data = read()
    part = data.only(["t"])

    def lengths(mixture: TaskMixture) -> list[int]:
        return [len(row.tokens.ids) for row in mixture.test_dataloader().dataset.examples]

    whole = lengths(data)
    assert whole == [57, 60, 9]
    for context, wanted in ((None, whole), (40, [40, 40, 9]), (58, [57, 58, 9]), (4096, whole)):
        part.fit_context(context)
        assert lengths(part) == wanted
        assert lengths(data) == whole
    part.eval_limit, last = 1, data.only(["t"])
    assert (len(lengths(part)), lengths(data), lengths(last)) == (1, whole, whole)
    part.eval_limit = None
    part.fit_context(None)
    assert part.test_dataloader().dataset.examples[0] is data.test_dataloader().dataset.examples[0], "read once"
    data.fit_context(3)
    with pytest.raises(ValueError, match="the target or a choice fills the base's context of 3 tokens; shorten it"):
        lengths(data)
