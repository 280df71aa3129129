"""The router alone in front of another server: it fills in `auto`, and passes everything else as it is."""

import asyncio
import json
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from testbed import served

from modular_experts.base import Base
from modular_experts.routing import Centroid
from modular_experts.serving.answers import Answerer
from modular_experts.serving.app import Limits, make_app
from modular_experts.serving.models import Models
from modular_experts.serving.proxy import _message, make_proxy
from modular_experts.serving.requests import ChatRequest

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
PARTS = [b'data: {"choices": []}\n\n', "data: {'schön'}\n\n".encode(), b"data: [DONE]\n\n"]


@contextmanager
def listening(app: Any) -> Iterator[str]:
    """Run an application on loopback, in a thread, and yield its address."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


class Stub:
    """A server that speaks OpenAI's protocol, and notes what it is asked; it waits behind each part of an answer."""

    def __init__(self, owner: str = "vllm", status: int = 200, wait: float = 0) -> None:
        self.owner, self.status, self.wait, self.asked = owner, status, wait, list[tuple[str, bytes, Any]]()
        self.app = FastAPI()
        self.app.add_api_route("/v1/models", self.models)
        self.app.add_api_route("/{rest:path}", self.answer, methods=["POST", "GET"], response_model=None)

    def models(self) -> dict[str, Any]:
        return {"data": [{"id": "tiny", "owned_by": self.owner}, {"id": "upper", "parent": "tiny"}]}

    async def answer(self, request: Request) -> Response:
        body = await request.body()
        self.asked.append((str(request.url).split("/", 3)[3].removeprefix("v1"), body, dict(request.headers)))
        if b"die" in body:

            async def broken():
                yield PARTS[0]
                raise ConnectionError

            return StreamingResponse(broken())
        if self.status != 200:
            return JSONResponse({"error": "teapot"}, self.status, {"x-reason": "tea"})

        async def parts():
            for part in PARTS:
                yield part
                await asyncio.sleep(self.wait)

        return StreamingResponse(parts(), media_type="text/event-stream", headers={"x-theirs": "yes"})


@pytest.fixture(scope="module")
def library(tiny_llama_dir: Path, task_files, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("proxied") / "library"
    make = served.router_of(tiny_llama_dir, place, task_files)
    make(Centroid(depths=(0.0, 0.5), reject=None))
    make(Centroid(depths=(0.0, 0.5), reject=0.99), "strict")
    return place


@pytest.fixture
def proxied(library: Path, tiny_llama_dir: Path):
    """Run the proxy in front of an address; `settings` are its limits."""

    @contextmanager
    def run(upstream: str, auto: str = "route", **settings: Any) -> Iterator[httpx.Client]:
        base = Base.open(tiny_llama_dir)
        models = Models(library, base.fingerprint, str(tiny_llama_dir), auto)
        app = make_proxy(models, base.load("float32"), base.tokenizer(), upstream, Limits(**settings))
        with listening(app) as address, httpx.Client(base_url=address, timeout=30) as client:
            yield client

    return run


def test_auto_becomes_what_the_router_alone_chooses_and_all_else_stays(proxied, library, tiny_llama_dir, task_files):
    base, stub, chosen = Base.open(tiny_llama_dir), Stub(), []
    found = Models(library, base.fingerprint, str(tiny_llama_dir), "route").find("auto")
    whole, tokenizer = base.load("float32"), base.tokenizer()
    prompts = [json.loads(line)["input"] for one in task_files.values() for line in one.read_text().splitlines()[:3]]
    with listening(stub.app) as address, proxied(address) as client:
        for prompt in prompts:
            ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            choice, _ = found.choose(whole, served.plainly(ids))
            chosen.append(choice.name)
            messages = [{"role": "user", "content": [{"type": "text", "text": prompt}]}]
            for path, asked in (
                (TEXT, {"model": "auto", "prompt": prompt, "temperature": 0.5, "ours": {"a": [1, None]}}),
                (TEXT, {"prompt": [prompt], "model": "auto"}),
                (CHAT, {"model": "auto", "messages": messages, "tools": [{"x": 1}], "seed": 2**60}),
            ):
                answer = client.post(path, json=asked, params={"q": "ü"}, headers={"authorization": "Bearer theirs"})
                place, body, headers = stub.asked.pop()
                assert json.loads(body) == asked | {"model": choice.name}
                assert place == f"{path.removeprefix('/v1')}?q=%C3%BC"
                assert headers["authorization"] == "Bearer theirs"
                assert answer.headers["x-expert"] == choice.name
                assert float(answer.headers["x-expert-confidence"]) == pytest.approx(choice.confidence, abs=1e-4)
                assert (answer.content, answer.headers["x-theirs"]) == (b"".join(PARTS), "yes")
    assert set(chosen) == {"upper", "reverse"}


def test_a_route_reads_the_roles_that_the_server_reads():
    asked = {"model": "auto", "messages": [{"role": "developer", "content": "Be short."}]}
    assert [_message(one) for one in asked["messages"]] == ChatRequest(**asked).prompt


def test_a_stream_comes_part_by_part_and_other_requests_byte_by_byte(proxied):
    stub, strange = Stub(wait=0.2), b'{ "model":"upper" ,"model": "nobody", "prompt": 1.0e2}'
    with listening(stub.app) as address, proxied(address) as client:
        with client.stream("POST", TEXT, json={"model": "auto", "prompt": "one"}) as answer:
            arrived = [(time.monotonic(), part) for part in answer.iter_raw()]
        assert [part for _, part in arrived] == PARTS
        assert arrived[-1][0] - arrived[0][0] > 0.2
        stub.wait = 0
        for body in (strange, b"\xff\x00", b"[" * 100_000, b"", b'["auto"]'):
            assert client.post("/v1/embeddings?a=1", content=body).status_code == 200
            assert stub.asked.pop()[1] == body
        assert client.get("/health").content == b"".join(PARTS)
        assert client.get("/v1/models").json() == stub.models()
        for path in ("/secret", "/v1/%2e%2e/secret", "/v1/a/%2E%2E/%2e%2e/secret"):
            assert client.get(path).status_code == 404
        assert not [place for place, *_ in stub.asked if "secret" in place]


def test_more_requests_than_the_limit_are_refused_until_one_ends(proxied):
    asked = {"model": "upper", "prompt": "one"}
    with listening(Stub(wait=0.2).app) as address, proxied(address, requests=1) as client:
        with client.stream("POST", TEXT, json=asked):
            assert client.post(TEXT, json=asked).status_code == 429
        # The proxy learns a moment later that the client has left.
        deadline = time.monotonic() + 10
        while (status := client.post(TEXT, json=asked).status_code) != 200:
            assert (status, time.monotonic() < deadline) == (429, True)


def test_errors_of_the_other_server_pass_and_one_that_is_away_is_told(proxied):
    stub = Stub(status=418)
    with listening(stub.app) as address, proxied(address) as client:
        for model in ("auto", "nobody"):
            answer = client.post(CHAT, json={"model": model, "messages": [{"role": "user", "content": "one"}]})
            assert (answer.status_code, answer.json(), answer.headers["x-reason"]) == (418, {"error": "teapot"}, "tea")
        with pytest.raises(httpx.RemoteProtocolError):
            client.post(TEXT, json={"model": "auto", "prompt": "die"})
    with proxied("http://127.0.0.1:1") as client:
        for model in ("auto", "upper"):
            answer = client.post(TEXT, json={"model": model, "prompt": "one"})
            told = "the server at http://127.0.0.1:1 does not answer (ConnectError)"
            assert (answer.status_code, answer.json()["error"]["message"]) == (502, told)


@pytest.mark.parametrize(
    ("owner", "auto", "names"),
    [("sglang", "route", {"tiny:upper", "tiny:reverse"}), ("sglang", "strict", {"tiny"}), ("vllm", "strict", {"tiny"})],
)
def test_names_are_spelt_as_the_other_server_spells_them(proxied, owner, auto, names):
    stub = Stub(owner)
    with listening(stub.app) as address, proxied(address, auto) as client:
        client.post(TEXT, json={"model": "auto", "prompt": "one two"})
    assert json.loads(stub.asked.pop()[1])["model"] in names


def test_the_guard_of_the_server_stands_in_front_and_prompts_that_cannot_be_read_are_refused(proxied):
    stub = Stub()
    with listening(stub.app) as address, proxied(address, body=2000, api_key="k") as client:
        assert client.post(TEXT, json={"model": "auto", "prompt": "one"}).status_code == 401
        client.headers["authorization"] = "Bearer k"
        assert client.post(TEXT, content=b"x" * 2001).status_code == 413
        for wrong in ({}, {"prompt": " "}, {"prompt": {}}, {"prompt": []}, {"messages": []}, {"messages": 3},
                      {"messages": ["x"]}, {"messages": [{"content": "x"}]}, {"prompt": [10**6]},
                      {"prompt": ["a", "b"]}):  # fmt: skip
            answer = client.post(CHAT, json={"model": "auto"} | wrong)
            assert answer.status_code == 400, wrong
            assert "cannot read the prompt" in answer.json()["error"]["message"]
        assert not stub.asked
        assert client.post(TEXT, json={"model": "auto", "prompt": "one"}).status_code == 200


def test_only_what_the_route_reads_stays_in_memory(library, tiny_llama_dir):
    base = Base.open(tiny_llama_dir)
    models = Models(library, base.fingerprint, str(tiny_llama_dir), "route")
    depth, model = max(models.find("auto").depths), base.load("float32")
    blocks = round(depth * model.config.num_hidden_layers)
    assert blocks < model.config.num_hidden_layers
    make_proxy(models, model, base.tokenizer(), "http://127.0.0.1:1", Limits())
    held = {name for name, weight in model.named_parameters() if weight.device == torch.device("cpu")}
    read = tuple(f"model.layers.{number}." for number in range(blocks))
    expected = {n for n, _ in model.named_parameters() if n.startswith(("model.embed", "model.norm", *read))}
    assert held == expected


def test_in_front_of_the_packages_own_server_answers_are_its_own(proxied, library, tiny_llama_dir):
    engine, _, tokenizer = served.opened(tiny_llama_dir, library)
    models = Models(library, Base.open(tiny_llama_dir).fingerprint, str(tiny_llama_dir), "route")
    app = make_app(Answerer(models, engine, tokenizer), Limits())
    with listening(app) as address, httpx.Client(base_url=address, timeout=60) as direct, proxied(address) as client:
        for prompt in ("upper word", "reverse dot", "first of all"):
            asked = {"model": "auto", "prompt": prompt, "max_tokens": 8}
            one, other = (each.post(TEXT, json=asked) for each in (direct, client))
            assert one.json()["choices"] == other.json()["choices"]
            assert one.json()["expert"] == other.json()["expert"] == other.headers["x-expert"]
            assert one.headers["x-expert-confidence"] == other.headers["x-expert-confidence"]
            streams = [each.post(TEXT, json=asked | {"stream": True}).text for each in (direct, client)]
            texts = [
                "".join(json.loads(p[6:])["choices"][0]["text"] for p in s.split("\n\n") if "choices" in p)
                for s in streams
            ]
            assert texts[0] == texts[1] == one.json()["choices"][0]["text"]
        answer = client.post(TEXT, json={"model": "nobody", "prompt": "one"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


def test_the_command_starts_it(library):
    words = ["serve", str(library), "--auto", "route", "--port", "0", "--in-front-of"]
    with listening(Stub().app) as address:
        process = served.Copy(*words, f"{address}/v1/")
        try:
            started = [process.stdout.readline() for _ in range(2)][1].split()[2].rstrip(";")
            answer = httpx.post(f"{started}/completions", json={"model": "auto", "prompt": "one"}, timeout=30)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)
    assert answer.content == b"".join(PARTS)
    assert answer.headers["x-expert"] in ("upper", "reverse")
