"""A library of experts that read prompts through the chat template and of others that do not, behind one route."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from testbed import served

from modular_experts.base import Base
from modular_experts.data import TaskMixture
from modular_experts.data.chat import template_hash
from modular_experts.data.inputs import as_prompts
from modular_experts.evaluation.streaming import Conversation, generate
from modular_experts.injection.attach import attached
from modular_experts.library import Library
from modular_experts.merging.route import route
from modular_experts.routing import Centroid, KernelRidge, Softmax
from modular_experts.serving.answers import read_prompt
from modular_experts.serving.models import Models, Route
from modular_experts.serving.samples import sample_prompts

TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
FORMS = {"upper": False, "reverse": True}


@pytest.fixture(scope="module")
def base(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the tiny Llama whose tokenizer has a chat template."""
    place = tmp_path_factory.mktemp("chats") / "base"
    shutil.copytree(tiny_llama_dir, place)
    tokenizer = Base.open(place).tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def tasks(task_files, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return task files: the first with plain rows, the second with conversations."""
    folder = tmp_path_factory.mktemp("rows")
    for name, is_chat in FORMS.items():
        rows = [json.loads(line) for line in task_files[name].read_text().splitlines()]
        if is_chat:
            rows = [
                {key: row[key] for key in row.keys() - {"input", "target"}}
                | {
                    "messages": [
                        {"role": "user", "content": row["input"]},
                        {"role": "assistant", "content": row["target"]},
                    ]
                }
                for row in rows
            ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [str(folder / f"{name}.jsonl") for name in FORMS]


@pytest.fixture(scope="module")
def library(base: Path, tasks: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("mixed") / "library"
    template = template_hash(Base.open(base).tokenizer())
    for seed, (name, is_chat) in enumerate(FORMS.items()):
        served.write(base, place / name, "lora", seed, training={"chat_template": template if is_chat else None})
    routers = {"ridge": KernelRidge(reject=None), "mean": Centroid(), "all": KernelRidge(select=Softmax())}
    for name, router in routers.items():
        data = TaskMixture(tasks, max_length=256)
        route([place / expert for expert in FORMS], place / name, router, data=data, base=str(base))
    return place


def opened(base: Path, library: Path) -> tuple[Models, Any, Any]:
    engine, models, tokenizer = served.opened(base, library)
    return models, tokenizer, engine.reader


@pytest.mark.parametrize("name", ["ridge", "mean", "all"])
def test_served_prompts_take_the_expert_and_the_form_of_the_route_s_evaluation(name, base, library, tasks) -> None:
    models, tokenizer, reader = opened(base, library)
    found = models.find(name)
    assert isinstance(found, Route)
    data = TaskMixture(tasks, tokenizer=str(base), max_length=256)
    data.setup("test")
    rows = data.test_dataloader().dataset.examples
    assert {row.task for row in rows} == set(FORMS)
    served_by, tested_by = [], []
    for row in rows:
        prompt = row.tokens.ids[: row.tokens.prompt].long()
        with torch.no_grad(), attached(reader, library / name) as there:
            reader(prompt[None])
            gates = there.current.gates
        best = int(gates.ids[0, gates.weights[0].argmax()])
        tested_by.append([*FORMS, "base"][best])
        messages = [{"role": "user", "content": str(row.input)}]
        choice, reading = found.choose(reader, read_prompt(models, tokenizer, name, messages)[1])
        served_by.append(choice.name)
        if choice.experts:
            assert FORMS[row.task] == reading.is_chat
            assert reading.ids == prompt.tolist()
    assert served_by == tested_by
    assert sum(expert == row.task for expert, row in zip(served_by, rows, strict=True)) >= 0.8 * len(rows)


def test_generate_and_a_conversation_answer_as_the_chosen_expert_alone(base, library, task_files) -> None:
    talk = Conversation(Base.open(base), Library(library))
    for name in FORMS:
        prompt = json.loads(task_files[name].read_text().splitlines()[0])["input"]
        alone = generate(base, prompt, library / name, max_new_tokens=6)
        assert generate(base, prompt, library / "ridge", max_new_tokens=6) == alone
        talk.experts.use("ridge")
        talk.messages = []
        answer = talk.ask(prompt)
        talk.experts.use(name)
        talk.messages = []
        assert talk.ask(prompt) == answer


def test_samples_of_chats_come_without_their_template(base, tasks, tmp_path) -> None:
    data = TaskMixture(tasks, tokenizer=str(base), max_length=256)
    experts = [
        served.write(base, tmp_path / name, "lora", inputs=as_prompts(data.only([name]).inputs(4))) for name in FORMS
    ]
    samples = sample_prompts(experts, Base.open(base).tokenizer())
    assert [samples[name].split()[0] for name in FORMS] == list(FORMS)
    assert not any("<" in text for text in samples.values())


def test_a_text_is_scored_as_it_stands(base, library) -> None:
    models, tokenizer, _ = opened(base, library)
    _, readings = read_prompt(models, tokenizer, "ridge", "upper dot:")
    assert (list(readings.by_form), readings.members, readings.base) == ([False], [False, False], False)


def test_a_prompt_that_every_form_rejects_goes_to_the_base_as_it_reads_prompts(base, library) -> None:
    models, tokenizer, reader = opened(base, library)
    found: Any = models.find("mean")
    found._router.farthest.fill_(0)
    messages = [{"role": "user", "content": "zq"}]
    choice, reading = found.choose(reader, read_prompt(models, tokenizer, "mean", messages)[1])
    assert (choice.name, choice.confidence, reading.is_chat) == ("base", None, True)
