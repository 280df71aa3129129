"""Requests of OpenAI's client and of everybody else, against the application in this process."""

import asyncio
import json
import random
import shutil
import threading
from pathlib import Path

import httpx
import openai
import pytest
from testbed import served

from modular_experts.data import chat as chats
from modular_experts.routing import Centroid
from modular_experts.serving.answers import Answerer
from modular_experts.serving.app import Limits, make_app
from modular_experts.serving.engine import EngineError, SideThreads
from modular_experts.serving.models import Route

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def library(tiny_llama_dir: Path, task_files, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = served.make_library(tiny_llama_dir, tmp_path_factory.mktemp("served") / "library")
    served.router_of(tiny_llama_dir, place, task_files)(Centroid(reject=None))
    return place


@pytest.fixture
def serve(library, tiny_llama_dir):
    """Run some asynchronous work with a client of the application; `settings` are its limits."""

    def run(work, **settings):
        engine, models, tokenizer = served.opened(tiny_llama_dir, library)
        answerer = Answerer(models, engine, tokenizer)
        app = make_app(answerer, Limits(**settings))

        async def all_of_it():
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
                return await work(client, answerer)

        return served.run(engine, all_of_it())

    return run


def openai_client(client: httpx.AsyncClient, key: str = "none") -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url="http://test/v1", api_key=key, http_client=client, max_retries=0)


def test_what_computes_beside_the_model_leaves_no_thread_behind(serve, monkeypatch) -> None:
    """Its workers of OpenMP would slow down each later pass of the model."""
    threads: list[threading.Thread] = []

    def noting(owner, name: str) -> None:
        call = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *all: threads.append(threading.current_thread()) or call(*all))

    async def work(client, answerer):
        noting(Route, "choose")
        noting(answerer.engine.experts, "take")
        for prompt in ("reverse dot:", "upper dot:"):
            answer = await client.post("/v1/completions", json={"model": "auto", "prompt": prompt, "max_tokens": 1})
            assert answer.status_code == 200
        for thread in threads:
            await asyncio.to_thread(thread.join, 10)
        return [thread.is_alive() for thread in threads]

    assert serve(work) == [False] * 4
    assert len(set(threads)) == 4


def test_calls_beside_the_model_follow_each_other_although_clients_leave() -> None:
    running, most, ended = [0], [0], []
    begun, go_on = threading.Event(), threading.Event()

    def work(number: int) -> int:
        running[0] += 1
        most[0] = max(most[0], running[0])
        begun.set()
        assert go_on.wait(30)
        running[0] -= 1
        ended.append(number)
        return number

    async def leave() -> int:
        beside = SideThreads()
        tasks = [asyncio.create_task(beside.call(work, number)) for number in range(4)]
        await asyncio.to_thread(begun.wait, 30)
        for task in tasks[:3]:
            task.cancel()
        # Here the last one would begin if the first one had given its turn away.
        await asyncio.sleep(0.05)
        go_on.set()
        return await tasks[3]

    assert asyncio.run(leave()) == 3
    assert most == [1]
    assert ended == [0, 3], "a call that nobody waits for has begun"


def test_the_client_of_openai_gets_what_generate_gives(serve, library, tiny_llama_dir) -> None:
    prompt = "reverse dot:"

    async def work(client, answerer):
        ask = openai_client(client)
        listed = [one.id async for one in ask.models.list()]
        one = await ask.models.retrieve("lora")
        whole = await ask.completions.create(model="lora", prompt=prompt, max_tokens=12, logprobs=2)
        ids = answerer.tokenizer(prompt)["input_ids"]
        by_ids = await ask.completions.create(model="lora", prompt=ids, max_tokens=12)
        chat, messages = ask.chat.completions, [{"role": "user", "content": prompt}]
        chosen = await chat.with_raw_response.create(model="auto", messages=messages, max_tokens=12)
        streamed = {"stream": True, "stream_options": {"include_usage": True}}
        stream = await chat.create(model="auto", messages=messages, max_completion_tokens=12, **streamed)
        told = await chat.create(model="lora", messages=messages, max_tokens=12, top_logprobs=2)
        return listed, one, whole, by_ids, chosen, [part async for part in stream], told

    listed, one, whole, by_ids, chosen, parts, told = serve(work)
    assert listed == ["auto", "base", *sorted([*served.FORMS, *served.ON_ANSWERS, "upper", "reverse", "route"])]
    assert one.id == "lora"
    expected = served.generated(tiny_llama_dir, library, prompt, "lora")
    assert whole.choices[0].text.strip() == by_ids.choices[0].text.strip() == expected
    counts = {"prompt_tokens": len(prompt), "completion_tokens": 12, "total_tokens": len(prompt) + 12}
    assert whole.usage.model_dump(exclude_none=True) == counts
    assert whole.choices[0].finish_reason == "length"
    logprobs = whole.choices[0].logprobs
    assert "".join(logprobs.tokens) == whole.choices[0].text
    assert all(max(top.values()) == p for top, p in zip(logprobs.top_logprobs, logprobs.token_logprobs, strict=True))
    assert [one.logprob for one in told.choices[0].logprobs.content] == pytest.approx(logprobs.token_logprobs)
    reversed_ = served.generated(tiny_llama_dir, library, prompt, "reverse")
    assert chosen.parse().choices[0].message.content.strip() == reversed_
    assert chosen.parse().expert == chosen.headers["x-expert"] == "reverse"
    assert chosen.parse().notice is None
    assert 0.5 < float(chosen.headers["x-expert-confidence"]) <= 1
    assert "".join(part.choices[0].delta.content for part in parts[:-1]).strip() == reversed_
    assert {part.expert for part in parts} == {"reverse"}
    assert [one.id.partition("-")[0] for one in (whole, told, parts[0])] == ["cmpl", "chatcmpl", "chatcmpl"]
    assert parts[0].choices[0].delta.role == "assistant"
    assert [part.choices[0].finish_reason for part in parts[:-1]][-1] == "length"
    assert parts[-1].usage.completion_tokens == 12


def test_an_answer_ends_before_a_stop_text_whole_or_streamed(serve, library, tiny_llama_dir) -> None:
    text = served.generated(tiny_llama_dir, library, "upper", "entries", 12)

    async def work(client, answerer):
        ask = openai_client(client)
        found = []
        for stop in (text[4:7], [text[9:], text[2:4]], "never there"):
            settings = {"model": "entries", "prompt": "upper", "max_tokens": 12, "stop": stop}
            whole = await ask.completions.create(**settings)
            parts = [part.choices[0] async for part in await ask.completions.create(**settings, stream=True)]
            assert "".join(part.text for part in parts) == whole.choices[0].text
            assert parts[-1].finish_reason == whole.choices[0].finish_reason
            found.append((whole.choices[0].text, whole.choices[0].finish_reason))
        assert answerer.engine.answering == 0
        return found

    ends = [min(text.find(stop) for stop in stops) for stops in ([text[4:7]], [text[9:], text[2:4]])]
    assert serve(work) == [(text[: ends[0]], "stop"), (text[: ends[1]], "stop"), (text, "length")]


def test_the_page_gets_the_library_its_base_its_experts_and_samples(serve, tiny_llama_dir) -> None:
    async def work(client, answerer):
        page = await client.get("/")
        return page.text, (await client.get("/about")).json()

    page, about = serve(work, samples=("upper dot:",))
    assert (about["library"], about["base"], about["auto"]) == ("library", tiny_llama_dir.name, "route")
    assert {"name": "upper", "kind": "expert", "tasks": ["upper"]} in about["models"]
    assert (about["models"][0]["name"], about["samples"]) == ("base", ["upper dot:"])
    assert page.count(">Ask<") == 1
    assert "one.notice" in page


def test_a_conversation_goes_through_the_template_with_which_experts_were_trained(serve, monkeypatch) -> None:
    read = []

    async def work(client, answerer):
        template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
        answerer.tokenizer.chat_template = template + "{% if add_generation_prompt %}<assistant>{% endif %}"
        monkeypatch.setattr(answerer.engine, "check", lambda experts, prompt, most: read.append(prompt))
        content = [{"type": "text", "text": "b"}]
        messages = [{"role": "developer", "content": "a"}, {"role": "user", "content": content}]
        for model, chat in (("base", None), ("lora", None), ("lora", "h")):
            monkeypatch.setattr(chats, "training_in_common", lambda _, chat=chat: {"chat_template": chat})
            await openai_client(client).chat.completions.create(model=model, messages=messages, max_tokens=1)

    serve(work)
    with_template = len("<system>a") + 1 + len("<user>b") + 1 + len("<assistant>")
    assert read == [with_template, len("a\nb"), with_template]


def test_a_prompt_of_which_the_template_leaves_nothing_is_refused(serve, monkeypatch) -> None:
    async def work(client, answerer):
        users = "{% for one in messages if one.role == 'user' %}{{ one.content }}{% endfor %}"
        monkeypatch.setattr(answerer.tokenizer, "chat_template", users)
        return await client.post(CHAT, json={"model": "base", "messages": [{"role": "system", "content": "a"}]})

    answer = serve(work)
    assert (answer.status_code, "the prompt is empty for the model" in answer.text) == (400, True)


def test_without_a_length_an_answer_takes_what_the_cache_has_left(serve) -> None:
    async def work(client, answerer):
        answerer.engine.cache_tokens = 40
        return await client.post("/v1/completions", json={"model": "lora", "prompt": "a" * 30})

    assert serve(work).json()["usage"]["completion_tokens"] == 10


IMAGE = [{"role": "user", "content": [{"type": "image_url", "image_url": "a"}]}]
WRONG = [
    ({"model": "lora"}, 400, "messages: field required"),
    ({"model": "lora", "messages": []}, 400, "messages: list should have at least 1 item"),
    ({"messages": [{"role": "user", "content": "a"}]}, 400, "model: field required"),
    ({"model": "loar"}, 404, "there is no model 'loar'; did you mean lora?"),
    ({"model": "lora", "temperature": -1}, 400, "temperature: input should be greater than or equal to 0"),
    ({"model": "lora", "temperature": "warm"}, 400, "temperature: input should be a valid number"),
    ({"model": "lora", "n": 2}, 400, "n: input should be 1"),
    ({"model": "lora", "tools": []}, 400, "this server does not know tools; leave it out"),
    ({"model": "lora", "presence_penalty": 0.5}, 400, "presence_penalty: input should be less than or equal to 0"),
    ({"model": "lora", "stop": [""]}, 400, "stop takes up to 16 texts of 1 to 256 characters"),
    ({"model": "lora", "max_tokens": 0}, 400, "max_tokens: input should be greater than or equal to 1"),
    ({"model": "lora", "seed": 2**70}, 400, "seed: "),
    ({"model": "lora", "messages": [{"role": "robot", "content": "a"}]}, 400, "messages.0.role: input should be"),
    ({"model": "lora", "messages": [{"role": "user", "content": "  "}]}, 400, "the prompt is empty"),
    ({"model": "lora", "messages": [{"role": "user"}]}, 400, "messages.0.content: field required"),
    ({"model": "lora", "messages": IMAGE}, 400, "messages.0.content: this server reads text alone"),
    ({"model": "lora", "messages": [{"role": "user", "content": "a" * 300}]}, 400, "the prompt has 300 tokens"),
]


def test_each_mistake_gets_one_sentence_in_the_form_that_clients_read(serve) -> None:
    async def work(client, answerer):
        found = []
        for body, _, sentence in WRONG:
            if sentence != "messages: field required":
                body = {"messages": [{"role": "user", "content": "a"}]} | body
            answer = await client.post(CHAT, json=body)
            found.append((answer.status_code, answer.json()["error"]["message"]))
        for prompt in ([], ["a", "b"], [[]], [1.5], {}, 3):
            answer = await client.post("/v1/completions", json={"model": "lora", "prompt": prompt})
            assert answer.status_code == 400
            assert answer.json()["error"]["message"].startswith("prompt: give one prompt in a request"), prompt
        for path in ("/v1/models/nobody", "/v1/nothing", CHAT):
            answer = await client.get(path)
            assert answer.status_code in (404, 405)
            assert answer.json()["error"]["message"]
        with pytest.raises(openai.NotFoundError, match="there is no model 'loar'"):
            await openai_client(client).completions.create(model="loar", prompt="a")
        return found

    for (status, message), (body, expected, sentence) in zip(serve(work), WRONG, strict=True):
        assert (status, message[: len(sentence)]) == (expected, sentence), body
        assert "\n" not in message


def test_null_is_a_field_that_is_not_there(serve) -> None:
    async def work(client, answerer):
        found = []
        names = ("temperature", "top_p", "n", "stop", "seed", "stream", "stream_options", "max_completion_tokens")
        for fields in ({}, dict.fromkeys((*names, "presence_penalty", "tools", "logit_bias", "logprobs", "user"))):
            messages = [{"role": "user", "content": [{"type": "text", "text": "a"}], "name": None}]
            body = {"model": "lora", "messages": messages, "max_tokens": 3} | fields
            found.append((await client.post(CHAT, json=body)).json()["choices"])
        for prompt in ("+/", ["+/"], [[75, 79]], [75, 79]):
            body = {"model": "lora", "prompt": prompt, "max_tokens": 3}
            found.append((await client.post("/v1/completions", json=body)).json()["choices"])
        return found

    chat, with_nulls, *prompts = serve(work)
    assert chat == with_nulls
    assert prompts[0][0]["text"].startswith(" ")
    assert prompts == [prompts[0]] * 4


def test_samples_are_the_same_each_time_only_with_a_seed(serve) -> None:
    async def work(client, answerer):
        ask, free = openai_client(client).completions.create, {"model": "lora", "prompt": "a", "temperature": 2.0}
        return [(await ask(**free, **seed)).choices[0].text for seed in ({}, {}, {"seed": 1}, {"seed": 1})]

    one, other, *seeded = serve(work)
    assert one != other
    assert seeded == [seeded[0]] * 2


HEADERS = [(b"content-type", b"application/json")]
SCOPE = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": HEADERS, "query_string": b""}


def test_whoever_leaves_before_the_first_token_frees_the_place(serve, monkeypatch) -> None:
    async def work(client, answerer):
        body = json.dumps({"model": "lora", "prompt": "upper"}).encode()
        asked, ended = [{"type": "http.disconnect"}, {"type": "http.request", "body": body}], asyncio.Event()

        async def queued(*_):
            try:
                yield await asyncio.Event().wait()
            finally:
                ended.set()

        async def receive():
            return asked.pop() if asked else await asyncio.Event().wait()

        async def send(message):
            pass

        monkeypatch.setattr(answerer.engine, "answer", queued)
        async with asyncio.timeout(20):
            await client._transport.app(SCOPE, receive, send)
            await ended.wait()
        return ended.is_set(), answerer.engine.answering

    assert serve(work) == (True, 0)


def test_whoever_stops_reading_frees_the_place(serve) -> None:
    async def work(client, answerer):
        body = json.dumps({"model": "lora", "prompt": "upper", "max_tokens": 200, "stream": True}).encode()
        asked, sent = [{"type": "http.request", "body": body}], []

        async def receive():
            return asked.pop() if asked else await asyncio.Event().wait()

        async def send(message):
            sent.append(message)
            if message["type"] == "http.response.body":
                await asyncio.Event().wait()

        await client._transport.app(SCOPE, receive, send)
        assert len(sent) == 2
        for _ in range(100):
            if not answerer.engine.answering:
                break
            await asyncio.sleep(0.01)
        return answerer.engine.answering, [slot.users for slot in answerer.engine.experts._slots.values()]

    assert serve(work, seconds=1) == (0, [0])


def hostile(draw: random.Random) -> tuple[str, bytes]:
    """Return a path and a body that no client sends."""
    values: list = [None, True, -1, 0, 1e308, 2**80, "", "\0", "a" * 5000, "../../etc/passwd", "💥" * 9]
    values += [[], {}, [[]], {"a": {}}]
    body = {"model": "lora", "prompt": "a", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
    body.pop(draw.choice(["prompt", "messages"]))
    for _ in range(draw.randint(1, 3)):
        key = draw.choice([*body, "temperature", "top_p", "stop", "stream_options", "logprobs", "seed", "__class__"])
        body[key] = draw.choice(values)
    raw = json.dumps(body).encode()
    form = draw.randrange(6)
    if form == 0:
        raw = b"[" * draw.randint(1, 200_000)
    elif form == 1:
        raw = draw.randbytes(draw.randint(0, 500))
    elif form == 2:
        raw = raw[: draw.randrange(len(raw))]
    elif form == 3:
        raw = json.dumps({"model": "lora", "messages": [{"role": "user", "content": "x" * 2**21}]}).encode()
    return draw.choice([CHAT, "/v1/completions"]), raw


def test_500_hostile_requests_get_a_sentence_each(serve) -> None:
    draw = random.Random(0)

    async def work(client, answerer):
        statuses = []
        for _ in range(500):
            path, raw = hostile(draw)
            answer = await client.post(path, content=raw, headers={"Content-Type": "application/json"})
            statuses.append(answer.status_code)
            if answer.status_code != 200:
                assert answer.json()["error"]["message"], raw[:200]
        assert (await client.get("/health")).json() == {"status": "ok"}
        assert answerer.engine.answering == 0
        return statuses

    statuses = serve(work)
    assert {*statuses} <= {200, 400, 404, 413}
    assert statuses.count(200) < 50


def test_more_requests_than_the_limit_are_refused_and_a_late_answer_ends(serve) -> None:
    async def work(client, answerer):
        async def ask(most: int):
            body = {"model": "lora", "prompt": "upper", "max_tokens": most}
            return (await client.post("/v1/completions", json=body)).status_code

        many = await asyncio.gather(*[ask(100) for _ in range(5)])
        return many, answerer.engine.answering

    many, answering = serve(work, requests=2)
    assert sorted(many) == [200, 200, 429, 429, 429]
    assert answering == 0
    many, answering = serve(work, seconds=0.05)
    assert {*many} == {504}
    assert answering == 0


def test_a_key_is_wanted_for_all_but_the_page_and_the_health(serve) -> None:
    async def work(client, answerer):
        found = {path: (await client.get(path)).status_code for path in ("/", "/health", "/metrics", "/v1/models")}
        with pytest.raises(openai.AuthenticationError, match="give the server's key"):
            await openai_client(client, "wrong").models.list()
        return found, [one.id async for one in openai_client(client, "secret").models.list()]

    found, listed = serve(work, api_key="secret")
    assert found == {"/": 200, "/health": 200, "/metrics": 401, "/v1/models": 401}
    assert "lora" in listed


def test_counts_are_those_of_the_answers_and_prompts_stay_out_of_the_log(serve, caplog) -> None:
    async def work(client, answerer):
        for _ in range(3):
            await client.post("/v1/completions", json={"model": "lora+tiles", "prompt": "secret", "max_tokens": 4})
        return (await client.get("/metrics")).text

    with caplog.at_level("DEBUG"):
        lines = serve(work).splitlines()
        assert "secret" not in caplog.text
        serve(work, log_prompts=True)
    assert "secret" in caplog.text
    for line in (
        'modular_experts_requests_total{end="whole",expert="tiles"} 3.0',
        'modular_experts_tokens_total{of="prompts"} 18.0',
        'modular_experts_tokens_total{of="answers"} 12.0',
        "modular_experts_experts 2.0",
        "modular_experts_answering 0.0",
        "modular_experts_first_token_seconds_count 3.0",
    ):
        assert line in lines


def test_a_failure_of_an_expert_or_the_model_is_the_servers(serve, library, monkeypatch) -> None:
    place = library / "broken"
    shutil.copytree(library / "dense", place)
    content = bytearray((place / "delta.safetensors").read_bytes())
    content[-9] ^= 255
    (place / "delta.safetensors").write_bytes(content)

    async def work(client, answerer):
        body = {"model": "broken", "prompt": "a", "max_tokens": 2}
        whole = await client.post("/v1/completions", json=body)
        streamed = await client.post("/v1/completions", json=body | {"stream": True})
        after = await client.post("/v1/completions", json=body | {"model": "dense"})
        assert after.status_code == 200

        async def failing(*_):
            raise EngineError("secret details")
            yield

        monkeypatch.setattr(answerer.engine, "answer", failing)
        body = {"model": "lora", "prompt": "a"}
        failed = await client.post("/v1/completions", json=body)
        failed_stream = await client.post("/v1/completions", json=body | {"stream": True})
        return (whole, streamed), (failed, failed_stream)

    try:
        found = serve(work)
    finally:
        shutil.rmtree(place)
    for whole, streamed in found:
        assert whole.status_code == 500
        assert whole.json() == json.loads(streamed.text.removeprefix("data: "))
        told = {"message": "the model failed; the log of the server says why", "type": "server_error"}
        assert told.items() <= whole.json()["error"].items()
        assert "secret" not in whole.text
