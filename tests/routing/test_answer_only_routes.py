"""Routes over experts that act on answers alone: rows answer as their expert does, and one pass reads a prompt."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_model
from testbed import runs, served
from testbed.padded_rows import padded
from testbed.routers import centroid
from transformers import AutoConfig, AutoModelForCausalLM

from modular_experts import Base, generate, open_expert
from modular_experts.data.batch import Collator, Example, Tokens
from modular_experts.evaluation import batch_losses
from modular_experts.experts import LoRAExpert
from modular_experts.injection import find_sites
from modular_experts.injection.attach import attached
from modular_experts.injection.routed import routed
from modular_experts.library import StoredExpert
from modular_experts.merging.route import route
from modular_experts.routing import Arrow, Centroid, KernelRidge, Oracle
from modular_experts.routing.gates import Softmax
from modular_experts.routing.prompts import prompt_vectors

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {},
    # Tokens see the three before them, and the cache keeps no more.
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "layer_types": ["sliding_attention"] * 2},
}
PROMPTS = [[7, 8, 9, 10, 11], [29], [33, 34, 35, 36], [50, 51, 52, 53, 54, 55, 49]]
ANSWERS = [[6, 17, 8], [14], [23, 24], [40, 41, 42, 43]]


RECURRENT = ["qwen3_5_text", "lfm2"]
"""Bases of which half the layers keep a state instead of keys and values."""


def model_of(architecture: str) -> Any:
    if architecture in RECURRENT:
        sizes = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "linear_num_key_heads": 2}
        sizes |= {"linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
        kind = "conv" if architecture == "lfm2" else "linear_attention"
        config = AutoConfig.for_model(architecture, **sizes, layer_types=[kind, "full_attention"] * 2)
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval().double()
    return build_model(architecture, **ARCHITECTURES[architecture]).double()


def stored(model: Any, library: Path, base: Path, on_answers: bool = True) -> list[StoredExpert]:
    """Write three experts of all linear layers."""
    shapes = {site.weight: site.module.weight.shape for site in find_sites(model) if not site.by_name_only}
    forms = enumerate(("lora", "entries", "dense"))
    return [served.write(base, library / form, form, seed, shapes, on_answers=on_answers) for seed, form in forms]


def batch_of(tasks: list[str], first: int = 0) -> dict[str, Any]:
    """Return a batch of as many rows as tasks, from one row on."""
    pairs = [*zip(PROMPTS, ANSWERS, strict=True)][first : first + len(tasks)]
    rows = [Tokens(torch.tensor(prompt + answer), len(prompt)) for prompt, answer in pairs]
    examples = [Example(task, "", None, row) for task, row in zip(tasks, rows, strict=True)]  # type: ignore[arg-type]
    return Collator(0, texts=False)(examples)


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *RECURRENT])
def test_each_row_answers_as_the_expert_that_the_base_s_states_choose(architecture, tmp_path, tiny_llama_dir) -> None:
    model = model_of(architecture)
    experts = stored(model, tmp_path, tiny_llama_dir)
    router = centroid(model, depths=[0.0, 0.5, 1.0])
    vectors = [torch.cat(prompt_vectors(model, torch.tensor([row]), None, router.depths), 1) for row in PROMPTS]
    gates = router(torch.cat(vectors)).ids[:, 0].tolist()
    assert len(set(gates)) > 1, "the test must route rows to different experts"
    how: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    read: list[torch.Size] = []
    (block, *_) = model.base_model.layers if hasattr(model.base_model, "layers") else model.base_model.h
    with routed(model, experts, router, check=False) as running, torch.no_grad():
        losses, _ = batch_losses(model, batch_of(["", "", "", ""]))
        assert running.current.gates.ids[:, 0].tolist() == gates
        counting = block.register_forward_hook(lambda _, inputs, output: read.append(output.shape[:2]))
        answers = model.generate(**padded(PROMPTS, "left"), **how)[:, -6:].tolist()
        counting.remove()
        # A batch of prompts of one token.
        assert model.generate(torch.tensor([PROMPTS[1]]), **how)[0, -6:].tolist() == answers[1]
        torch.testing.assert_close(batch_losses(model, batch_of([""], 1))[0], losses[1:2], rtol=0, atol=1e-9)
    # The base reads all prompts once, and each step of the answers one token. A state is made by a pass of its own.
    assert read == [(4, 7), *[(4, 6)] * (architecture in RECURRENT), *[(4, 1)] * 6]
    assert not hasattr(model, "answer_only")
    for number, (row, gate) in enumerate(zip(PROMPTS, gates, strict=True)):
        with attached(model, experts[gate], check=False), torch.no_grad():
            alone, _ = batch_losses(model, batch_of(["", "", "", ""]))
            torch.testing.assert_close(losses[number], alone[number], rtol=0, atol=1e-9)
            assert model.generate(torch.tensor([row]), **how)[0, -6:].tolist() == answers[number]


@pytest.mark.parametrize("router", [KernelRidge(select=Softmax(), reject=None), Arrow(), Oracle()])
def test_routers_of_every_scope_weigh_answers_as_they_weigh_ordinary_rows(router, tmp_path, tiny_llama_dir, task_files):
    losses = {}
    for on_answers in (True, False):
        place = tmp_path / str(on_answers)
        served.router_of(tiny_llama_dir, place, task_files, on_answers=on_answers)(router)
        model = Base.open(tiny_llama_dir).load()
        with attached(model, place / "route"), torch.no_grad():
            losses[on_answers], _ = batch_losses(model, batch_of(["upper", "reverse", "upper", "reverse"]))
    # The second prompt is its own last token, so that there is nothing that ordinary experts move besides.
    close = torch.isclose(losses[True], losses[False], atol=1e-4)
    assert close.tolist() == [False, True, False, False]


def test_a_library_of_them_is_routed_evaluated_and_asked(tmp_path, tiny_llama_dir, task_files) -> None:
    library = tmp_path / "library"
    make = served.router_of(tiny_llama_dir, library, task_files, on_answers=True)
    made = make(KernelRidge(reject=None))
    for prompt, expert in (("upper dot:", "upper"), ("reverse dot:", "reverse")):
        answer = generate(tiny_llama_dir, prompt, library / "route", 6)
        assert answer == generate(tiny_llama_dir, prompt, library / expert, 6)
    data = runs.mixture({name: task_files[name] for name in ("upper", "reverse")}, tiny_llama_dir)
    scores = {}
    for name in ("route", "upper", "reverse"):
        module = runs.module(tiny_llama_dir, None, applied=[str(library / name)])
        (scores[name],) = runs.trainer(tmp_path).test(module, data, verbose=False)
    for task in ("upper", "reverse"):
        own = {name: value for name, value in scores[task].items() if f"/{task}/" in f"/{name}/"}
        assert own
        assert own == pytest.approx({name: scores["route"][name] for name in own}, abs=1e-5)
    assert open_expert(library / "route").content_hash == made.content_hash


def test_experts_of_both_sorts_are_not_routed_and_nothing_is_trained_on_top(tmp_path, tiny_llama_dir, task_files):
    library = tmp_path / "library"
    make = served.router_of(tiny_llama_dir, library, task_files, on_answers=True)
    served.write(tiny_llama_dir, library / "ordinary", "lora", 3)
    with pytest.raises(ValueError, match="upper acts on answers alone and ordinary on prompts, too, so one model"):
        route([library / "upper", library / "ordinary"], library / "mixed", Arrow())
    with pytest.raises(ValueError, match="upper acts on answers alone and ordinary on prompts, too, so one model"):
        make(Centroid(), "spared", fallback=library / "ordinary")
    make(KernelRidge())
    with pytest.raises(ValueError, match="act on answers alone, so nothing is trained on top of them"):
        runs.fit(tiny_llama_dir, task_files, tmp_path, LoRAExpert, own={"applied": [str(library / "route")]})
