"""An ensemble predicts the mean of its members' predictions, for losses, choices and generated answers alike."""

from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES, build_model, build_tokenizer

from modular_experts.base.apply import applied
from modular_experts.data import Task, TaskMixture
from modular_experts.deltas import Dense, LowRank
from modular_experts.evaluation import measure
from modular_experts.evaluation.likelihood import batch_losses
from modular_experts.injection import find_sites
from modular_experts.injection.ensemble import ensembled


def experts_of(model: Any) -> list[dict[str, Any]]:
    """Return three experts, of which two move other weights, strongly enough that their predictions are far apart."""
    draw = torch.Generator().manual_seed(1)
    found: list[dict[str, Any]] = [{}, {}, {}]
    for number, site in enumerate(site for site in find_sites(model) if not site.by_name_only):
        rows, columns = site.module.weight.shape
        found[number % 2][site.weight] = Dense(torch.randn(rows, columns, generator=draw) * 0.3)
        up, down = torch.randn(rows, 2, generator=draw), torch.randn(2, columns, generator=draw)
        found[2][site.weight] = LowRank(up * 0.3, down)
    return found


def members_logits(model: Any, experts: list[Any], inputs: dict[str, Any]) -> torch.Tensor:
    """Return the logits of each member alone, `(members, rows, length, vocabulary)`."""
    found = []
    for expert in experts:
        with applied(model, expert, check=False), torch.no_grad():
            found.append(model(**inputs).logits)
    return torch.stack(found)


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "gemma2"])
@pytest.mark.parametrize("mean", ["probabilities", "logits"])
def test_logits_are_the_mean_of_what_each_member_predicts_alone(architecture, mean) -> None:
    # Gemma 2 caps its logits after the head, so that their mean must be taken after the cap.
    model = build_model(architecture, **({"initializer_range": 0.3} if architecture == "gemma2" else {}))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    experts = experts_of(model)
    ids = torch.randint(3, 20, (2, 6), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1], [1] * 6])}
    alone = members_logits(model, experts, inputs)
    wanted = alone.softmax(-1).mean(0).log() if mean == "probabilities" else alone.mean(0)
    labels = torch.cat([torch.full((2, 2), -100), ids[:, 2:]], 1)
    with ensembled(model, experts, mean, check=False), torch.no_grad():
        output = model(**inputs, labels=labels)
    found = output.logits
    loss = torch.nn.functional.cross_entropy(wanted[:, 1:-1].flatten(0, 1), ids[:, 2:].flatten())
    torch.testing.assert_close(output.loss, loss, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[:, 1:], wanted[:, 1:], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(alone[0], alone[2], atol=1e-2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        assert model(**inputs).logits.shape == found.shape


def test_losses_choices_and_answers_are_those_of_the_mean(task_files) -> None:
    model, tokenizer = build_model("llama").eval(), build_tokenizer()
    experts = experts_of(model)
    data = TaskMixture([Task(name=name, path=str(file)) for name, file in task_files.items()], tokenizer)
    data.setup("test")
    batch = next(iter(data.test_dataloader()))
    alone = []
    for expert in experts:
        with applied(model, expert, check=False), torch.no_grad():
            alone.append([batch_losses(model, _one_token(batch, row))[0] for row in range(len(batch["task"]))])
    with ensembled(model, experts, check=False), torch.no_grad():
        mine = [batch_losses(model, _one_token(batch, row))[0] for row in range(len(batch["task"]))]
        scores = measure(model, tokenizer, [batch], data.roles, 4, examples=1000)
    for row, loss in enumerate(mine):
        mean = torch.stack([torch.exp(-each[row]) for each in alone]).mean(0)
        torch.testing.assert_close(loss, -mean.log(), rtol=1e-4, atol=1e-4)
    answers = {one["input"]: one["answer"] for rows in scores["examples"].values() for one in rows}
    # Greedy decoding by hand, from the members alone.
    for row in range(len(batch["task"])):
        prompt = int((batch["labels"][row] != -100).int().argmax())
        ids = batch["input_ids"][row, :prompt][None]
        for _ in range(4):
            token = members_logits(model, experts, {"input_ids": ids})[:, 0, -1].softmax(-1).mean(0).argmax()
            ids = torch.cat([ids, token[None, None]], 1)
            if token == tokenizer.eos_token_id:
                break
        text = tokenizer.decode(ids[0, prompt:], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert answers[batch["input"][row]] == text.strip()


def _one_token(batch: Any, row: int) -> Any:
    """Return one row of a batch of which only the first token of the target counts."""
    labels = batch["labels"][row : row + 1].clone()
    first = int((labels[0] != -100).int().argmax())
    labels[0, first + 1 :] = -100
    keys = ("input_ids", "attention_mask")
    return {key: batch[key][row : row + 1] for key in keys} | {"labels": labels, "task": batch["task"][row : row + 1]}


def test_a_mean_of_something_else_and_what_cannot_be_routed_are_refused() -> None:
    model = build_model("llama")
    with (
        pytest.raises(ValueError, match="mean='votes' must be 'probabilities' or 'logits'"),
        ensembled(model, [{}], "votes"),
    ):  # type: ignore[arg-type]
        pass
    norm = {"model.norm.weight": Dense(torch.ones_like(model.get_parameter("model.norm.weight")))}
    with pytest.raises(ValueError, match="not a linear layer's weight"), ensembled(model, [norm], check=False):
        pass
