"""An encoder of sentences that reads prompts beside the base: its vectors, routes with it, and mistakes."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import build_model
from testbed import classifiers, served
from testbed.runs import mixture
from transformers import AutoModel, AutoTokenizer

from modular_experts import TaskMixture, evaluate, route
from modular_experts.__main__ import main
from modular_experts.base import Base
from modular_experts.base.sentence_encoder import SentenceEncoder
from modular_experts.data.batch import IGNORED, Collator, repacked
from modular_experts.data.chat import PromptReading, PromptReadings
from modular_experts.evaluation.likelihood import batch_losses
from modular_experts.injection.attach import attached, open_route
from modular_experts.library import open_expert, open_statistics
from modular_experts.merging.statistics import take_statistics
from modular_experts.routing import KernelRidge
from modular_experts.routing.prompts import prompt_grams, prompt_vectors, vectors_for
from modular_experts.serving.models import Route

TASKS = ["upper", "reverse"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return classifiers.build("bert", tmp_path_factory.mktemp("encoder") / "sentences")


@pytest.fixture(scope="module")
def library(tiny_llama_dir: Path, encoder: Path, task_files: dict[str, Path], tmp_path_factory: Any) -> Path:
    """A library of two experts that keep no statistics, and a route with the encoder."""
    place = tmp_path_factory.mktemp("with encoder") / "library"
    for seed, name in enumerate(TASKS):
        served.write(tiny_llama_dir, place / name, "lora", seed)
    route([place / name for name in TASKS], place / "route", router(encoder), data=data(task_files))
    return place


def router(encoder: Path) -> KernelRidge:
    return KernelRidge(reject=None, encoder=str(encoder))


def data(task_files: dict[str, Path]) -> TaskMixture:
    return TaskMixture([str(task_files[name]) for name in TASKS])


def by_hand(encoder: Path, text: str) -> torch.Tensor:
    read = AutoTokenizer.from_pretrained(encoder)(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return F.normalize(AutoModel.from_pretrained(encoder)(read).last_hidden_state.mean(1), dim=1)[0]


def test_a_vector_is_the_mean_of_the_last_hidden_states_of_the_text(tiny_llama_dir, encoder) -> None:
    base = Base.open(tiny_llama_dir)
    tokenizer = base.tokenizer()
    texts = ["a longer text than the others here", "short", "another text", *(f"number {n}" for n in range(70))]
    prompts = [[tokenizer.eos_token_id, *tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
    found = SentenceEncoder(encoder)(base.load(), prompts)
    torch.testing.assert_close(found, torch.stack([by_hand(encoder, text) for text in texts]), rtol=1e-5, atol=1e-6)


def test_a_route_reads_prompts_as_it_learned_them(library, tiny_llama_dir, encoder, task_files) -> None:
    opened = open_route(open_expert(library / "route"))
    (learned,) = opened.routers.values()
    statistics = open_statistics(open_expert(library / "upper"), "prompt_parts")
    assert list(statistics) == ["depth 0", "depth 0.25", "depth 0.5", "depth 0.75", "depth 1", "encoder", "n-grams"]
    assert statistics.facts["data"]["encoder"] == Base.open(encoder).fingerprint
    base = Base.open(tiny_llama_dir)
    model = base.load()
    tokens = base.tokenizer()("upper bat:", return_tensors="pt")["input_ids"]
    read = vectors_for(learned, model, tokens)
    parts = [*prompt_vectors(model, tokens, None, learned.depths), by_hand(encoder, "upper bat:")[None]]
    torch.testing.assert_close(read, torch.cat([*parts, prompt_grams(tokens, None)], 1), rtol=1e-5, atol=1e-6)
    # Each learned prompt has its own vector; "upper" and ":" are the instruction, which all parts lack.
    lines = [json.loads(line) for line in task_files["upper"].read_text().splitlines()]
    texts = [row["input"] for row in lines if row["split"] != "test"]
    pairs = statistics["encoder"].values.unflatten(0, (-1, 2))
    for place, wanted in enumerate([texts, [text.removeprefix("upper ").removesuffix(":") for text in texts]]):
        vectors = torch.stack([by_hand(encoder, text) for text in wanted])
        assert torch.cdist(vectors, pairs[:, place]).amin(1).max() < 1e-5


def test_prompts_are_read_alike_padded_packed_evaluated_and_served(library, tiny_llama_dir, task_files) -> None:
    mixed = mixture({name: task_files[name] for name in TASKS}, tiny_llama_dir)
    mixed.setup("test")
    rows = mixed.test_dataloader().dataset.examples[:7]
    batch = Collator(pad_id=0)(rows)
    model = Base.open(tiny_llama_dir).load()
    with torch.no_grad(), attached(model, library / "route") as there:
        prompt = (batch["labels"] != IGNORED).cumsum(1) == 0
        vectors = vectors_for(there.router, model, batch["input_ids"], batch["attention_mask"], prompt)
        scores = there.router.scores(vectors)
        packed = repacked(batch)
        losses = batch_losses(model, batch)[0]
        torch.testing.assert_close(batch_losses(model, packed)[0], losses, rtol=1e-4, atol=1e-4)
    found = Route(open_expert(library / "route"))
    chosen = []
    for row in rows:
        ids = row.tokens.ids[: row.tokens.prompt].long().tolist()
        readings = PromptReadings({False: PromptReading(ids, [1], False)}, [False, False], False)
        chosen.append(found.choose(Base.open(tiny_llama_dir).load(), readings)[0].name)
    assert chosen == [TASKS[int(best)] for best in scores.argmax(1)]
    results = evaluate(None, {"route": [str(library / "route")]}, mixed)
    assert {row["task"] for row in results.rows} >= set(TASKS)


def test_statistics_without_the_encoder_are_replaced(library, encoder, task_files, tmp_path) -> None:
    for name in TASKS:
        shutil.copytree(library / name, tmp_path / name)
        shutil.rmtree(tmp_path / name / "statistics")
    experts = [tmp_path / name for name in TASKS]
    take_statistics(experts, "prompt_parts", data(task_files))
    with pytest.raises(ValueError, match="2 of 2 experts have no prompt_parts statistics"):
        route(experts, tmp_path / "route", router(encoder))
    made = route(experts, tmp_path / "route", router(encoder), data=data(task_files))
    wanted = open_expert(library / "route").state()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in made.state().items())


def test_the_command_routes_with_an_encoder(library, encoder, task_files, tmp_path, capsys) -> None:
    tasks = [str(task_files[name]) for name in TASKS]
    experts = [str(library / name) for name in TASKS]
    how = ["--router.encoder", str(encoder), "--out", str(tmp_path / "r")]
    code = main(["route", "--experts", *experts, "--tasks", *tasks, *how])
    assert code == 0, capsys.readouterr().err
    assert f"shrink=0.8, reject=0.01, depths=[0.0, 0.25], encoder={str(encoder)!r}" in capsys.readouterr().out.replace(
        '"', "'"
    )
    assert main(["generate", "--experts", str(tmp_path / "r"), "--prompt", "upper bat:", "--max_new_tokens", "2"]) == 0


def test_mistakes_get_a_sentence(library, tiny_llama_dir, encoder, task_files, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"is a LlamaForCausalLM, and not an encoder of sentences; give one such as"):
        SentenceEncoder(tiny_llama_dir)
    with pytest.raises(ValueError, match="LlamaForCausalLM was made in memory and names no tokenizer"):
        SentenceEncoder(encoder)(build_model("llama"), [[5, 6]])
    with pytest.raises(ValueError, match="encoder='x' reads prompts, and gram are of something else"):
        take_statistics([library / "upper"], "gram", data(task_files), encoder="x")
    alone = router(encoder)
    alone.experts = 2
    with pytest.raises(ValueError, match=re.escape(f"the encoder {encoder} is not open; set encode=Sent")):
        vectors_for(alone, Base.open(tiny_llama_dir).load(), torch.tensor([[5, 6]]))


def test_another_encoder_at_the_same_place_is_refused(tiny_llama_dir, task_files, library, tmp_path) -> None:
    place = classifiers.build("bert", tmp_path / "sentences")
    for name in TASKS:
        shutil.copytree(library / name, tmp_path / name)
    route([tmp_path / name for name in TASKS], tmp_path / "route", router(place), data=data(task_files))
    first = shutil.copytree(place, tmp_path / "first")
    torch.manual_seed(5)
    other = AutoModel.from_pretrained(place)
    other.get_input_embeddings().weight.data.normal_()
    other.save_pretrained(place)
    with pytest.raises(ValueError, match="route learned with another encoder than the one that lies at"):
        open_route(open_expert(tmp_path / "route"))
    shutil.rmtree(place)
    with pytest.raises(FileNotFoundError, match=r"a router's encoder of sentences is missing: .*sentences' was not"):
        open_route(open_expert(tmp_path / "route"))
    # A moved library finds the encoder beside it.
    (tmp_path / "elsewhere").mkdir()
    for name in [*TASKS, "route"]:
        shutil.copytree(tmp_path / name, tmp_path / "elsewhere" / "library" / name)
    shutil.copytree(first, tmp_path / "elsewhere" / "sentences")
    (learned,) = open_route(open_expert(tmp_path / "elsewhere" / "library" / "route")).routers.values()
    assert learned.encode.place == str(tmp_path / "elsewhere" / "sentences")
