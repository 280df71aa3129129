"""Serve a library over HTTP in OpenAI's protocol, with FastAPI."""

import asyncio
import hmac
import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from modular_experts.serving.answers import Answer, Answerer, AnswerPart, Parts
from modular_experts.serving.engine import Engine, EngineError
from modular_experts.serving.models import AUTO, BASE, Listed, UnknownModelError
from modular_experts.serving.requests import ChatRequest, CompletionRequest, Json, sentence

log = logging.getLogger(__name__)
PAGE = Path(__file__).with_name("page.html")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Limits:
    """What a server takes.

    Args:
        requests: The most requests that are answered or wait; more are refused (429).
        seconds: The most time of an answer, with waiting.
        body: The most bytes of a request.
        api_key: What requests must send as `Authorization: Bearer KEY`, or None.
        log_prompts: Whether the log holds prompts and answers.
        samples: Prompts that the page offers to try.
    """

    requests: int = 256
    seconds: float = 600.0
    body: int = 2**20
    api_key: str | None = None
    log_prompts: bool = False
    samples: Sequence[str] = ()


def make_app(answerer: Answerer, limits: Limits = Limits()) -> FastAPI:
    """Return the application, which starts the engine and stops it."""

    @asynccontextmanager
    async def running(app: FastAPI) -> AsyncIterator[None]:
        answerer.engine.start()
        yield
        await asyncio.to_thread(answerer.engine.stop)

    server = _Server(answerer, limits)
    app = FastAPI(title="modular-experts", lifespan=running)
    app.add_middleware(Guard, limits=limits)
    app.add_exception_handler(RequestValidationError, _refuse_fields)
    app.add_exception_handler(StarletteHTTPException, send_refusal)
    app.add_api_route("/v1/models", server.models, methods=["GET"])
    app.add_api_route("/v1/models/{name}", server.model, methods=["GET"])
    app.add_api_route("/v1/chat/completions", server.chat, methods=["POST"], response_model=None)
    app.add_api_route("/v1/completions", server.complete, methods=["POST"], response_model=None)
    app.add_api_route("/health", server.health, methods=["GET"])
    app.add_api_route("/metrics", server.metrics, methods=["GET"])
    app.add_api_route("/about", server.about, methods=["GET"], include_in_schema=False)
    app.add_api_route("/", lambda: FileResponse(PAGE), methods=["GET"], include_in_schema=False)
    return app


class _Server:
    """The endpoints."""

    def __init__(self, answerer: Answerer, limits: Limits) -> None:
        self.answerer = answerer
        self.limits = limits
        self.measured = Metrics(answerer.engine)

    def models(self) -> Json:
        """The models that a request may name, beside sums such as `a+0.5*b`."""
        return {"object": "list", "data": self._models()}

    def model(self, name: str) -> Json:
        """One of the models."""
        for model in self._models():
            if model["id"] == name:
                return model
        raise refusal(404, f"there is no model {name[:200]!r}", "model")

    def _models(self) -> list[Json]:
        models = self.answerer.models
        auto = [] if models.auto is None else [Listed(AUTO, "route", 0)]
        return [
            {
                "id": listed.name,
                "object": "model",
                "created": listed.created,
                "owned_by": "modular-experts",
                "kind": listed.kind,
            }
            for listed in (*auto, *models.listed())
        ]

    def about(self) -> Json:
        """The library, its base and its models, as the page at / shows them."""
        models = self.answerer.models
        return {
            "library": models.library_name,
            "base": models.base_name,
            "auto": models.auto,
            "models": [{"name": listed.name, "kind": listed.kind, "tasks": listed.tasks} for listed in models.listed()],
            "samples": list(self.limits.samples),
        }

    def health(self) -> dict[str, str]:
        """Whether the server answers."""
        return {"status": "ok"}

    def metrics(self) -> Response:
        """Counts of requests, tokens and time, as Prometheus reads them."""
        return Response(self.measured.text(), media_type="text/plain; version=0.0.4")

    async def chat(self, request: Request, body: ChatRequest) -> Response:
        """Go on with a conversation."""
        return await self._answer(request, body)

    async def complete(self, request: Request, body: CompletionRequest) -> Response:
        """Go on with a text."""
        return await self._answer(request, body)

    async def _answer(self, request: Request, body: ChatRequest | CompletionRequest) -> Response:
        started = time.monotonic()
        try:
            answer = await self.answerer.answer(body.model, body.prompt, body.most_tokens, body.stops, body.sampling)
        except UnknownModelError as error:
            raise refusal(404, str(error), "model") from None
        except (ValueError, FileNotFoundError) as error:
            raise refusal(400, str(error)) from None
        choice = answer.choice
        id = f"{body.prefix}-{uuid.uuid4().hex}"
        if self.limits.log_prompts:
            log.info("%s asks %s: %s", id, choice.name, body.prompt)
        parts = self._measured(id, answer, started)
        head: Json = {
            "id": id,
            "created": int(time.time()),
            "model": body.model,
            "expert": choice.name,
            "confidence": choice.confidence,
            "notice": choice.notice,
        }
        if body.stream:
            events = self._events(body, head | {"object": body.part_object}, answer, parts)
            return Stream(events, events, "text/event-stream", choice.headers)
        whole = self._choice(body, await _unless_gone(request, _joined(parts)), is_part=False)
        content = head | {"object": body.whole_object, "choices": [whole], "usage": answer.usage}
        return JSONResponse(content, headers=choice.headers)

    def _choice(self, body: ChatRequest | CompletionRequest, part: AnswerPart, is_part: bool) -> Json:
        logprobs = None if body.alternatives is None else body.logprobs_of(part.tokens, self.answerer.tokenizer)
        return {"index": 0, **body.in_field(part.text, is_part), "finish_reason": part.finish, "logprobs": logprobs}

    async def _events(
        self, body: ChatRequest | CompletionRequest, head: Json, answer: Answer, parts: Parts
    ) -> AsyncGenerator[str, None]:
        """Yield an answer as server-sent events."""
        try:
            async with aclosing(parts):
                if isinstance(body, ChatRequest):
                    start = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
                    yield _event(head | {"choices": [start]})
                async for part in parts:
                    yield _event(head | {"choices": [self._choice(body, part, is_part=True)]})
                if body.stream_options is not None and body.stream_options.include_usage:
                    yield _event(head | {"choices": [], "usage": answer.usage})
                yield "data: [DONE]\n\n"
        except HTTPException as error:
            yield _event(error.detail)

    async def _measured(self, id: str, answer: Answer, started: float) -> Parts:
        """Yield the parts of an answer until its time is over, and count them."""
        deadline = asyncio.get_running_loop().time() + self.limits.seconds - (time.monotonic() - started)
        text = ""
        finish = None
        try:
            async with aclosing(answer.parts) as parts:
                while finish is None:
                    async with asyncio.timeout_at(deadline):
                        part = await anext(parts)
                    if not text:
                        self.measured.first_token.observe(time.monotonic() - started)
                    text += part.text
                    finish = part.finish
                    yield part
        except TimeoutError:
            raise refusal(504, f"the answer took more than {self.limits.seconds:g} seconds") from None
        except EngineError as error:
            log.error("The model failed: %s", error)
            raise refusal(500, "the model failed; the log of the server says why") from None
        finally:
            self.measured.count(answer, time.monotonic() - started, finish is not None)
            if self.limits.log_prompts:
                log.info("%s is answered: %s", id, text)


class Metrics:
    """Counts requests, tokens and time for Prometheus, since the server started."""

    def __init__(self, engine: Engine) -> None:
        self._registry = registry = CollectorRegistry()
        name = "modular_experts_{}".format
        self._requests = Counter(name("requests"), "Answers", ["expert", "end"], registry=registry)
        self._tokens = Counter(name("tokens"), "Tokens of prompts and answers", ["of"], registry=registry)
        self._seconds = Histogram(name("seconds"), "Time from a request to the end of its answer", registry=registry)
        self.first_token = Histogram(name("first_token_seconds"), "Time to the first text", registry=registry)
        gauges = {
            "answering": ("Requests that are answered or wait for a row", lambda: engine.answering),
            "experts": ("Experts in memory", lambda: len(engine.experts)),
            "expert_bytes": ("Bytes of the experts in memory", lambda: engine.experts.nbytes),
        }
        for key, (text, value) in gauges.items():
            Gauge(name(key), text, registry=registry).set_function(value)

    def count(self, answer: Answer, seconds: float, finished: bool) -> None:
        """Count an answer that has ended."""
        end = "whole" if finished else "broken off"
        for name in [expert.name for expert, _ in answer.choice.experts] or [BASE]:
            self._requests.labels(name, end).inc()
        self._tokens.labels("prompts").inc(answer.prompt_tokens)
        self._tokens.labels("answers").inc(answer.tokens)
        self._seconds.observe(seconds)

    def text(self) -> bytes:
        """Return all counts as Prometheus reads them."""
        return generate_latest(self._registry)


class Source(Protocol):
    """Where a streamed answer comes from."""

    async def aclose(self) -> None: ...


class Stream(StreamingResponse):
    """A streamed answer, whose source is closed when it ends or the client leaves, even while it is sent something."""

    def __init__(
        self,
        content: AsyncIterator[str] | AsyncIterator[bytes],
        source: Source,
        media_type: str | None = None,
        headers: dict[str, str] | None = None,
        status_code: int = 200,
    ) -> None:
        super().__init__(content, status_code, headers, media_type)
        self.source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self.source):
            await super().__call__(scope, receive, send)


class Guard:
    """Refuses requests that are too many, too large or do not know the key, and ends those that take too long."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self.app = app
        self.limits = limits
        self.busy = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if (refused := self._refusal(scope)) is not None:
            return await send_refusal(Request(scope), refused)(scope, receive, send)
        if scope["method"] != "POST":
            return await self.app(scope, receive, send)
        read = 0

        async def limited() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.limits.body:
                raise refusal(413, f"the request has more than {self.limits.body} bytes; shorten it")
            return message

        self.busy += 1
        try:
            # An answer has less time; this ends requests whose client neither reads on nor leaves.
            async with asyncio.timeout(self.limits.seconds + 1):
                with suppress(ClientDisconnect):
                    await self.app(scope, limited, send)
        except TimeoutError:
            log.warning("A client took more than %g seconds to send or read; it is left", self.limits.seconds + 1)
        finally:
            self.busy -= 1

    def _refusal(self, scope: Scope) -> HTTPException | None:
        key = self.limits.api_key
        authorization = dict(scope["headers"]).get(b"authorization", b"")
        known = key is None or hmac.compare_digest(authorization.removeprefix(b"Bearer ").strip(), key.encode())
        if not known and scope["path"] not in ("/", "/health"):
            return refusal(401, "give the server's key as Authorization: Bearer KEY")
        if scope["method"] == "POST" and self.busy >= self.limits.requests:
            why = f"{self.busy} requests are being answered; try again later"
            return refusal(429, why, headers={"Retry-After": "1"})
        return None


async def _joined(parts: Parts) -> AnswerPart:
    async with aclosing(parts):
        written = [part async for part in parts]
    text = "".join(part.text for part in written)
    tokens = [token for part in written for token in part.tokens]
    return AnswerPart(text, tokens, written[-1].finish)


async def _unless_gone(request: Request, work: Awaitable[Result]) -> Result:
    """Wait for some work, and end it if the client leaves, also while it waits for its turn."""
    task = asyncio.ensure_future(work)
    try:
        while not task.done():
            await asyncio.wait([task], timeout=0.5)
            if not task.done() and await request.is_disconnected():
                raise refusal(499, "the client left")
        return task.result()
    finally:
        task.cancel()


def _event(content: object) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def refusal(
    status: int, message: str, param: str | None = None, headers: Mapping[str, str] | None = None
) -> HTTPException:
    """Return an error that ends a request with one sentence, in the form that clients of OpenAI read."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    code = {401: "invalid_api_key", 404: "model_not_found", 429: "rate_limit_exceeded"}.get(status)
    return HTTPException(status, {"error": {"message": message, "type": kind, "param": param, "code": code}}, headers)


def send_refusal(request: Request, error: Exception) -> JSONResponse:
    """Answer with an error; FastAPI's own errors have a text alone."""
    assert isinstance(error, StarletteHTTPException)
    if not isinstance(error.detail, dict):
        error = refusal(error.status_code, str(error.detail), headers=error.headers)
    return JSONResponse(error.detail, error.status_code, error.headers)


def _refuse_fields(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return send_refusal(request, refusal(400, *sentence(error.errors())))
