"""A server that does not answer with an expert is found by its log-probabilities, and a sound one passes."""

import json
from contextlib import nullcontext

import httpx
import pytest
import torch
from conftest import build_model
from testbed import served
from transformers import DynamicCache

from modular_experts.__main__ import main
from modular_experts.base import Base
from modular_experts.base.apply import applied
from modular_experts.data import TaskMixture
from modular_experts.interop.verify_server import verify_server
from modular_experts.library import open_expert

FAULTS = {
    "wrong prefix": "base",
    "half of the layers": "differs",
    "wrong scale": "differs",
    "another expert": "other",
    "stale prefix": "differs",
    "another base": "other base",
    "absent": "absent",
}
NAMES = ("a", "b", "c")


class Server:
    """Answers requests greedily, with a fault in what it does for the expert `a`."""

    def __init__(self, base, library, fault, seed, dtype="float32"):
        self.model = Base.open(base).load(dtype)
        if fault == "another base":
            self.model = build_model("llama", seed=seed + 50)
        self.library, self.fault, self.seed = library, fault, seed
        self.tokenizer = Base.open(base).tokenizer()
        self.asked = []

    def deltas(self, name):
        expert = dict(open_expert(self.library / name))
        chosen = torch.Generator().manual_seed(self.seed)
        if name != "a" or self.fault is None:
            return expert
        if self.fault == "wrong prefix":
            return {}
        if self.fault == "half of the layers":
            order = torch.randperm(len(expert), generator=chosen)[: len(expert) // 2].tolist()
            return {weight: expert[weight] for number, weight in enumerate(expert) if number in order}
        if self.fault == "wrong scale":
            scale = (0.5, 2.0, 0.25)[self.seed % 3]
            return {weight: delta * scale for weight, delta in expert.items()}
        if self.fault == "another expert":
            return dict(open_expert(self.library / "bc"[self.seed % 2]))
        return expert

    def put(self, name):
        return nullcontext() if name == "base" else applied(self.model, self.deltas(name), check=False)

    def __call__(self, request):
        if request.url.path == "/v1/models":
            served_names = [name for name in ("base", *NAMES) if (name, self.fault) != ("a", "absent")]
            return httpx.Response(200, json={"data": [{"id": name} for name in served_names]})
        body = json.loads(request.content)
        name, prompt = body["model"], body["prompt"]
        stale = self.fault == "stale prefix" and name == "a" and prompt in self.asked
        self.asked.append(prompt)
        tokens, logprobs = [], []
        cache = DynamicCache()
        with torch.no_grad():
            reader = nullcontext() if stale else self.put(name)
            with reader:
                self.model(input_ids=torch.tensor([prompt[:-1]]), cache=cache, use_cache=True)
            with self.put(name):
                token = prompt[-1]
                for _ in range(body["max_tokens"]):
                    out = self.model(input_ids=torch.tensor([[token]]), cache=cache, use_cache=True)
                    likely = out.logits[0, -1].float().log_softmax(-1)
                    token = int(likely.argmax())
                    tokens.append(token)
                    logprobs.append(float(likely[token]))
                    if token == self.tokenizer.eos_token_id:
                        break
        names = [f"token_id:{token}" for token in tokens]
        return httpx.Response(200, json={"choices": [{"logprobs": {"tokens": names, "token_logprobs": logprobs}}]})

    @property
    def client(self):
        return httpx.Client(transport=httpx.MockTransport(self), base_url="http://server/v1/")


@pytest.fixture(scope="module")
def library(tiny_llama_dir, tmp_path_factory):
    place = tmp_path_factory.mktemp("library")
    for seed, name in enumerate(NAMES):
        served.write(tiny_llama_dir, place / name, "lora", seed)
    return place


@pytest.fixture(scope="module")
def data(task_files):
    return TaskMixture(task_files["upper"])


def verdicts(base, library, data, server, names=NAMES):
    experts = [open_expert(library / name) for name in names]
    return {verdict.expert: verdict for verdict in verify_server("", experts, data=data, client=server.client)}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_and_the_sound_experts_beside_it_pass(fault, seed, tiny_llama_dir, library, data) -> None:
    found = verdicts(tiny_llama_dir, library, data, Server(tiny_llama_dir, library, fault, seed))
    assert found["a"].finding == FAULTS[fault], str(found["a"])
    if fault == "another expert":
        assert found["a"].nearest == "bc"[seed % 2]
    others = {found[name].finding for name in "bc"}
    assert others == ({"other base"} if fault == "another base" else {"acts"})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_a_sound_server_passes_whatever_it_rounds_to(dtype, tiny_llama_dir, library, data) -> None:
    found = verdicts(tiny_llama_dir, library, data, Server(tiny_llama_dir, library, None, 0, dtype))
    assert {verdict.finding for verdict in found.values()} == {"acts"}, [*map(str, found.values())]
    assert all(verdict.share == pytest.approx(1, abs=0.1) for verdict in found.values())


@pytest.mark.parametrize(
    "logprobs",
    [None, {}, {"tokens": ["token_id:5"]}, {"tokens": ["token_id:x"], "token_logprobs": [0.0]}, {"tokens": 5}],
)
def test_a_server_without_log_probabilities_is_refused(logprobs, tiny_llama_dir, library, data) -> None:
    server = Server(tiny_llama_dir, library, None, 0)
    answer = httpx.Response(200, json={"choices": [{"logprobs": logprobs}]})
    client = httpx.Client(
        transport=httpx.MockTransport(lambda request: server(request) if request.method == "GET" else answer),
        base_url="http://server/v1/",
    )
    with pytest.raises(ValueError, match="the server gives no log-probabilities for base; start it so that it does"):
        verify_server("", [open_expert(library / "a")], data=data, client=client)


def test_tokens_that_have_no_id_here_prove_nothing(tiny_llama_dir, library, data) -> None:
    server = Server(tiny_llama_dir, library, None, 0)
    strange = {"tokens": ["token_id:1000000"], "token_logprobs": [0.0]}
    answer = httpx.Response(200, json={"choices": [{"logprobs": strange}]})
    client = httpx.Client(
        transport=httpx.MockTransport(lambda request: server(request) if request.method == "GET" else answer),
        base_url="http://server/v1/",
    )
    (found,) = verify_server("", [open_expert(library / "a")], data=data, client=client)
    assert found.finding == "unclear"


def test_an_expert_called_base_and_experts_without_inputs_are_refused(tiny_llama_dir, library, tmp_path) -> None:
    served.write(tiny_llama_dir, tmp_path / "base", "lora", 0)
    with pytest.raises(ValueError, match="an expert is called base, as servers call the base"):
        verify_server("", [open_expert(tmp_path / "base")])
    with pytest.raises(ValueError, match="1 of 1 experts keep no inputs"):
        verify_server("", [open_expert(library / "a")], client=Server(tiny_llama_dir, library, None, 0).client)


def test_options_of_a_server_need_one(library, capsys) -> None:
    assert main(["verify", str(library), "--tasks", "rows.jsonl"]) == 2
    assert "--tasks and --dtype are for --server" in capsys.readouterr().err
