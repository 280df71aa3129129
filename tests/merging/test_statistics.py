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

from modular_experts.__main__ import main
from modular_experts.base import Base
from modular_experts.base.apply import applied
from modular_experts.base.files import fingerprint
from modular_experts.data import TaskMixture
from modular_experts.evaluation.gram import gram
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


def test_gram_knows_linear_weights_alone_and_leaves_no_hook_and_no_rows_are_refused(batches):
    model = build_model("llama")
    assert set(gram(model, batches, [WEIGHTS[0], WEIGHTS[3]]).values()) == {None}
    gram(model, batches, WEIGHTS)
    assert not any(module._forward_pre_hooks for module in model.modules())
    # GPT-2's layers store `(in, out)`, but for its head.
    names = ["transformer.h.0.attn.c_attn.weight", "lm_head.weight"]
    assert [one.inputs for one in gram(build_model("gpt2"), batches, names).values()] == [0, 1]
    with pytest.raises(ValueError, match="at least one row with a target"):
        fisher(model, [], WEIGHTS)
    with pytest.raises(ValueError, match="at least one row, and there was none"):
        gram(model, [], WEIGHTS)


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


def test_the_command_says_what_it_took_and_each_method_merges_it(place, capsys):
    for kind, method in {"gram": "RegMean", "fisher": "Fisher", "merged_gram": "RegMeanPlusPlus"}.items():
        assert take(kind, "--rows", "4") == 0
        told = f"statistics/{kind}.safetensors: {kind} statistics of 3 weights on 4 rows of"
        for task, line in zip(("upper", "reverse"), capsys.readouterr().out.splitlines(), strict=False):
            assert line.startswith(f"library/{task}/{told} {task}")
        assert command("merge", "--method", method, "--out", f"library/{method}") == 0
        assert len(open_expert(f"library/{method}")) == 3
        capsys.readouterr()
    assert main(["show", "library/upper"]) == 0
    assert "gram: 3 weights on 4 rows of upper" in " ".join(capsys.readouterr().out.split())


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
