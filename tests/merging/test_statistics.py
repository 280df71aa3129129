"""Statistics against autograd, hooks and least squares written here, and the commands from experts to their merge."""

import json
import shutil
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from conftest import build_model, write_rows
from testbed.random_deltas import random_delta
from testbed.runs import mixture
from transformers.pytorch_utils import Conv1D

from modular_experts.__main__ import main
from modular_experts.base import Base
from modular_experts.base.apply import applied
from modular_experts.base.files import fingerprint
from modular_experts.data import TaskMixture
from modular_experts.evaluation.gram import gram, merged_grams
from modular_experts.library import make_record, open_expert, open_statistics, write_expert
from modular_experts.merging.fisher_information import fisher
from modular_experts.merging.objective import ValidationRows
from modular_experts.merging.statistics import take_statistics

NAMES = ("embed_tokens", "layers.0.self_attn.q_proj", "layers.1.mlp.down_proj", "norm")
WEIGHTS = [f"model.{name}.weight" for name in NAMES]
LINEAR = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.up_proj"]


@pytest.fixture
def batches(tiny_llama_dir, task_files):
    """Batches of rows of several lengths, so of padding."""
    data = mixture({"reverse": task_files["reverse"], "first": task_files["first"]}, tiny_llama_dir, eval_batch_size=5)
    data.setup("validate")
    found = list(data.val_dataloader())
    assert any((batch["attention_mask"] == 0).any() for batch in found)
    return found


def rows_of(batches):
    """Token ids of each row without padding, and where its target begins."""
    for batch in batches:
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
            yield ids[: mask.sum()][None], int((labels != -100).int().argmax())


def hooked_inputs(model, rows, names):
    """The inputs `(tokens, in)` of named layers, each row run by itself."""
    inputs = defaultdict(list)
    handles = [
        model.get_submodule(name).register_forward_hook(lambda _, args, __, name=name: inputs[name].append(args[0][0]))
        for name in names
    ]
    with torch.no_grad():
        for ids, _ in rows:
            model(ids)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(found) for name, found in inputs.items()}


def state(model):
    return {name: weight.detach().clone() for name, weight in model.state_dict().items()}


def test_fisher_is_the_mean_over_rows_of_squared_gradients(batches):
    model = build_model("llama").double()
    expected, rows = dict.fromkeys(WEIGHTS, 0.0), list(rows_of(batches))
    for ids, first in rows:
        likelihoods = model(ids).logits.log_softmax(-1)[0, first - 1 : -1]
        total = likelihoods.gather(1, ids[0, first:, None]).sum()
        gradients = torch.autograd.grad(total, [model.get_parameter(name) for name in WEIGHTS])
        for name, gradient in zip(WEIGHTS, gradients, strict=True):
            expected[name] += gradient.square() / len(rows)
    found = fisher(model, batches, WEIGHTS)
    assert list(found) == WEIGHTS
    for name, one in found.items():
        torch.testing.assert_close(one.values, expected[name], rtol=1e-9, atol=1e-15)


def test_fisher_does_not_depend_on_batches_and_leaves_the_model_as_it_was(batches, tiny_llama_dir, task_files):
    model = build_model("llama").train()
    model.get_parameter(WEIGHTS[1]).requires_grad_(False)
    before = state(model)
    required = [parameter.requires_grad for parameter in model.parameters()]
    found = fisher(model, batches, WEIGHTS[1:])
    tensors = [{key: one for key, one in batch.items() if torch.is_tensor(one)} for batch in batches]
    single = [{k: one[k][i : i + 1] for k in one} for one in tensors for i in range(len(one["labels"]))]
    again = fisher(model, single, WEIGHTS[1:])
    for name in found:
        torch.testing.assert_close(found[name].values, again[name].values, rtol=1e-4, atol=1e-9)
    assert model.training
    assert [parameter.requires_grad for parameter in model.parameters()] == required
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(not parameter._post_accumulate_grad_hooks for parameter in model.parameters())
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "neox"])
def test_gram_is_the_mean_of_products_of_inputs_without_padding(architecture, batches):
    model = build_model(architecture).double()
    kinds = (torch.nn.Linear, Conv1D)
    layers = [name for name, layer in model.named_modules() if isinstance(layer, kinds)]
    found = gram(model, batches, [f"{name}.weight" for name in layers])
    inputs = hooked_inputs(model, rows_of(batches), layers)
    for name in layers:
        one, x = found[f"{name}.weight"], inputs[name]
        assert model.get_parameter(f"{name}.weight").shape[one.inputs] == x.shape[1]
        assert one.inputs == (0 if architecture == "gpt2" and "lm_head" not in name else 1)
        torch.testing.assert_close(one.values, x.T @ x / len(x), rtol=1e-8, atol=1e-10)


def test_gram_knows_no_other_weights_and_leaves_no_hook_and_no_rows_are_refused(batches):
    model = build_model("llama")
    assert set(gram(model, batches, [WEIGHTS[0], WEIGHTS[3]]).values()) == {None}
    gram(model, batches, WEIGHTS)
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(ValueError, match="at least one row with a target"):
        fisher(model, [], WEIGHTS)
    with pytest.raises(ValueError, match="at least one row, and there was none"):
        gram(model, [], WEIGHTS)


def solved(deltas, grams):
    """RegMean with its default reduction, as the paper writes it."""
    reduced = [0.9 * gram + 0.1 * torch.diag(gram.diagonal()) for gram in grams]
    return sum(d @ g for d, g in zip(deltas, reduced, strict=True)) @ torch.linalg.inv(sum(reduced))


def test_merged_gram_takes_inputs_behind_the_merged_blocks(batches):
    model = build_model("llama").double()
    names, data = [f"{name}.weight" for name in LINEAR], [batches[:1], batches[1:]]
    shapes = {name: model.get_parameter(name).shape for name in names}
    numbered = [list(enumerate(names, first)) for first in (1, 5)]
    experts = [{name: random_delta("Dense", shapes[name], 7 * n) * 0.1 for n, name in one} for one in numbered]
    del experts[1][names[1]]
    before = state(model)
    found = merged_grams(model, experts, data, names[::-1])
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())

    def inputs(weights, part):  # of a fresh model with the weights moved
        other = build_model("llama").double()
        with torch.no_grad():
            for name, delta in weights.items():
                other.get_parameter(name).add_(delta)
        return {f"{n}.weight": x.T @ x / len(x) for n, x in hooked_inputs(other, rows_of(part), LINEAR).items()}

    zeros = {name: torch.zeros(shapes[name], dtype=torch.float64) for name in names}
    dense = [zeros | {name: delta.dense() for name, delta in expert.items()} for expert in experts]
    first = [inputs({n: own[n] for n in names[:2]}, part) for own, part in zip(dense, data, strict=True)]
    merged = {n: solved([own[n] for own in dense], [grams[n] for grams in first]) for n in names[:2]}
    second = [inputs(merged | {names[2]: own[names[2]]}, part) for own, part in zip(dense, data, strict=True)]
    alone = inputs(dense[0], data[0])
    for number in range(2):
        for name in names[:2]:
            torch.testing.assert_close(found[number][name].values, first[number][name], rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(found[number][names[2]].values, second[number][names[2]], rtol=1e-8, atol=1e-10)
    assert not torch.allclose(found[0][names[2]].values, alone[names[2]], rtol=1e-4), "behind the expert's own block"


# From experts and task files to a merge.


@pytest.fixture
def place(tmp_path, monkeypatch, tiny_llama_dir, task_files) -> Path:
    """A directory with task files and two experts, which move weights of which one is common."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    base = {"id": str(tiny_llama_dir), "revision": None, "fingerprint": fingerprint(tiny_llama_dir)}
    shapes = Base.open(tiny_llama_dir).structure.shapes
    for number, (task, own) in enumerate({"upper": LINEAR[:2], "reverse": LINEAR[1:]}.items()):
        shutil.copy(task_files[task], f"{task}.jsonl")
        names = [f"{module}.weight" for module in own]
        deltas = [(name, random_delta("Dense", shapes[name], number, torch.float32) * 0.1) for name in names]
        write_expert(f"library/{task}", deltas, make_record("FullExpert", base, tasks=[task]))
    return tmp_path


EXPERTS = ["library/upper", "library/reverse"]
TASKS = [{"name": "upper", "path": "upper.jsonl"}, {"name": "reverse", "path": "reverse.jsonl"}]


def command(verb, *arguments):
    return main([verb, "--experts", json.dumps(EXPERTS), *arguments])


def take(kind, *arguments):
    return command("statistics", "--kind", kind, "--tasks", json.dumps(TASKS), *arguments)


def outputs_distance(merged):
    """The sum over experts of how far the outputs are from the expert's, on its validation rows, by each layer."""
    distances = defaultdict(float)
    for expert, task in zip(map(open_expert, EXPERTS), TASKS, strict=True):
        model = Base.open(expert.record["base"]["id"]).load()
        data = TaskMixture([task], tokenizer=expert.record["base"]["id"])
        with applied(model, [expert]):
            inputs = hooked_inputs(model, rows_of(data.val_dataloader()), LINEAR)
        for layer, x in inputs.items():
            name = f"{layer}.weight"
            own = expert[name].dense() if name in expert else 0.0
            distances[name] += (x @ (merged[name].dense() - own).T).square().sum().item() / len(x)
    return distances


def test_reg_mean_from_stored_experts_is_nearer_to_their_outputs_than_the_average(place, capsys):
    assert take("gram") == 0
    out, told = capsys.readouterr().out.splitlines(), "statistics/gram.safetensors: gram statistics of 3 weights on 6"
    assert out[0].startswith(f"library/upper/{told} rows of upper")
    assert out[1].startswith(f"library/reverse/{told}")
    assert command("merge", "--method", "RegMean", "--method.reduce", "1", "--out", "library/near") == 0
    assert command("merge", "--method", "Average", "--out", "library/mean") == 0
    near, mean = outputs_distance(open_expert("library/near")), outputs_distance(open_expert("library/mean"))
    assert len(near) == 3
    for name, distance in near.items():
        assert distance < 0.9 * mean[name]
    assert main(["show", "library/upper"]) == 0
    assert "gram: 3 weights on 6 rows of upper" in " ".join(capsys.readouterr().out.split())


def test_fisher_and_reg_mean_plus_plus_merge_what_was_stored_for_them(place, capsys):
    for kind, method in {"fisher": "Fisher", "merged_gram": "RegMeanPlusPlus"}.items():
        assert take(kind, "--rows", "4") == 0
        assert open_statistics(open_expert(EXPERTS[0]), kind).facts["tasks"] == {"upper": 4}
        assert command("merge", "--method", method, "--out", f"library/{method}") == 0
        assert len(open_expert(f"library/{method}")) == 3
    alone = ["--experts", "[library/upper]", "--method", "RegMeanPlusPlus", "--out", "library/alone"]
    assert main(["merge", *alone]) == 1
    assert "merged_gram statistics of" in (error := capsys.readouterr().err)
    assert "were taken in a merge of other experts" in error


@pytest.mark.parametrize("kind", ["fisher", "gram", "merged_gram", "prompts", "prompt_parts"])
def test_a_base_in_bfloat16_gives_about_the_same_in_float32(place, kind):
    assert take(kind) == 0
    wanted = dict(open_statistics(open_expert(EXPERTS[0]), kind))
    assert take(kind, "--dtype", "bfloat16", "--overwrite") == 0
    found = dict(open_statistics(open_expert(EXPERTS[0]), kind))
    assert found.keys() == wanted.keys()
    for name, one in found.items():
        assert one.values.dtype == torch.float32
        assert 0 <= (one.values - wanted[name].values).norm() < 0.05 * wanted[name].values.norm(), name
    assert any(not torch.equal(one.values, wanted[name].values) for name, one in found.items())


def test_only_validation_rows_of_the_experts_own_tasks_are_looked_at(place):
    def stored():
        take_statistics(EXPERTS, "fisher", TaskMixture(TASKS), overwrite=True)
        return [Path(expert, "statistics/fisher.safetensors").read_bytes() for expert in EXPERTS]

    def change(task, split):
        rows = [json.loads(line) for line in Path(f"{task}.jsonl").read_text().splitlines()]
        changed = [row | {"target": "zz"} if row["split"] == split else row for row in rows]
        write_rows(Path(f"{task}.jsonl"), changed)

    before = stored()
    for split in ("train", "test"):
        change("upper", split)
    assert stored() == before
    change("upper", "validation")
    after = stored()
    assert after[0] != before[0]
    assert after[1] == before[1]


def test_statistics_of_the_answers_of_each_expert_read_no_targets(place):
    answers = ["--labels", "experts", "--max_new_tokens", "3"]
    rows = [json.loads(line) for line in Path("upper.jsonl").read_text().splitlines()]
    assert take("gram", *answers) == 0
    before = Path("library/upper/statistics/gram.safetensors").read_bytes()
    write_rows(Path("upper.jsonl"), [{key: row[key] for key in ("input", "split")} for row in rows])
    assert take("gram", *answers, "--overwrite", "true") == 0
    assert Path("library/upper/statistics/gram.safetensors").read_bytes() == before
    expert = open_expert("library/upper")
    model, tokenizer = (getattr(Base.open(expert.record["base"]["id"]), part)() for part in ("load", "tokenizer"))
    with applied(model, [expert]), torch.no_grad():
        answered = []
        for row in rows:
            ids = tokenizer(row["input"], return_tensors="pt")["input_ids"]
            start = ids.shape[1]
            while ids.shape[1] < start + 3 and (ids.shape[1] == start or ids[0, -1] != tokenizer.eos_token_id):
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
            answered += [(ids, start)] if row["split"] == "validation" else []
        x = hooked_inputs(model, answered, LINEAR[:1])[LINEAR[0]]
    found = open_statistics(expert, "gram")
    torch.testing.assert_close(found[f"{LINEAR[0]}.weight"].values, x.T @ x / len(x), rtol=1e-4, atol=1e-5)
    assert found.facts["tasks"] == {"upper": len(answered)}
    assert found.facts["data"]["labels"] == "experts"


def test_each_expert_is_measured_on_rows_in_the_form_of_its_training(place, tiny_llama_dir, caplog):
    shutil.copytree(tiny_llama_dir, "chats")
    tokenizer = Base.open("chats").tokenizer()
    tokenizer.chat_template = "{% for message in messages %}<{{ message.content }}>{% endfor %}"
    tokenizer.save_pretrained("chats")
    for path, template in zip(EXPERTS, ("a" * 64, None), strict=True):
        expert = open_expert(path)
        write_expert(path, dict(expert), expert.record | {"training": {"chat_template": template}}, overwrite=True)

    def taken(experts, **settings):
        data = ValidationRows(TaskMixture(TASKS, **settings), base="chats")
        return [found["n-grams"].values for found in take_statistics(experts, "prompts", data, overwrite=True)]

    plain = taken(EXPERTS)
    assert [message.split(" is measured")[0] for message in caplog.messages] == ["upper"]
    chat = taken(EXPERTS, chat_template=True)
    assert all(map(torch.equal, plain, chat))
    assert torch.equal(taken(EXPERTS[:1], chat_template=True)[0], plain[0])
    assert torch.equal(taken(EXPERTS[1:])[0], plain[1])
    for path in EXPERTS:
        expert = open_expert(path)
        write_expert(path, dict(expert), expert.record | {"training": {}}, overwrite=True)
    for found, other, own in zip(taken(EXPERTS), taken(EXPERTS, chat_template=True), plain, strict=True):
        assert torch.equal(found, own) != torch.equal(other, own)
