"""Serve a library over HTTP in OpenAI's protocol, with FastAPI."""

import asyncio
import hmac
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from importlib import resources
from typing import Any, ClassVar

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from modular_experts.serving.answers import Answer, Answerer, Piece
from modular_experts.serving.engine import EngineError, Token
from modular_experts.serving.metrics import Metrics
from modular_experts.serving.models import AUTO, UnknownModelError
from modular_experts.serving.requests import ChatRequest, CompletionRequest, sentence

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """What a server takes.

    Args:
        requests: The most requests that are answered or wait; more are refused (429).
        seconds: The most time of an answer, with waiting.
        body: The most bytes of a request.
        api_key: What requests must send as `Authorization: Bearer KEY`, or None.
        log_prompts: Whether the log holds prompts and answers.
    """

    requests: int = 256
    seconds: float = 600.0
    body: int = 2**20
    api_key: str | None = None
    log_prompts: bool = False


def make_app(answerer: Answerer, limits: Limits = Limits()) -> FastAPI:
    """Return the application, which starts the engine and stops it."""

    @asynccontextmanager
    async def running(app: FastAPI) -> AsyncIterator[None]:
        answerer.engine.start()
        yield
        await asyncio.to_thread(answerer.engine.stop)

    app, server = FastAPI(title="modular-experts", lifespan=running), _Server(answerer, limits)
    app.add_middleware(Guard, limits=limits)
    app.add_exception_handler(RequestValidationError, _refuse_fields)
    app.add_exception_handler(StarletteHTTPException, send_refusal)
    app.add_api_route("/v1/models", server.models, methods=["GET"])
    app.add_api_route("/v1/models/{name}", server.model, methods=["GET"])
    app.add_api_route("/v1/chat/completions", server.chat, methods=["POST"], response_model=None)
    app.add_api_route("/v1/completions", server.complete, methods=["POST"], response_model=None)
    app.add_api_route("/health", server.health, methods=["GET"])
    app.add_api_route("/metrics", server.metrics, methods=["GET"])
    app.add_api_route("/", page, methods=["GET"], include_in_schema=False)
    return app


def page() -> HTMLResponse:
    """A page on which to ask."""
    return HTMLResponse(resources.files("modular_experts.serving").joinpath("page.html").read_text(encoding="utf-8"))


class _Server:
    """The endpoints."""

    def __init__(self, answerer: Answerer, limits: Limits) -> None:
        self.answerer, self.limits, self.measured = answerer, limits, Metrics(answerer.engine)

    def models(self) -> dict[str, Any]:
        """The models that a request may name, beside sums such as `a+0.5*b`."""
        found = [_listed(one.name, one.kind, one.created) for one in self.answerer.models.listed()]
        auto = self.answerer.models.auto
        return {"object": "list", "data": [*[_listed(AUTO, "route", 0)] * (auto is not None), *found]}

    def model(self, name: str) -> dict[str, Any]:
        """One of the models."""
        for one in self.models()["data"]:
            if one["id"] == name:
                return one
        raise refusal(404, f"there is no model {name[:200]!r}", "model")

    def health(self) -> dict[str, str]:
        """Whether the server answers."""
        return {"status": "ok"}

    def metrics(self) -> Response:
        """Counts of requests, tokens and time, as Prometheus reads them."""
        return Response(self.measured.text(), media_type="text/plain; version=0.0.4")

    async def chat(self, request: Request, body: ChatRequest) -> Response:
        """Go on with a conversation."""
        return await self._answer(request, body, _Chat)

    async def complete(self, request: Request, body: CompletionRequest) -> Response:
        """Go on with a text."""
        return await self._answer(request, body, _Completion)

    async def _answer(self, request: Request, body: Any, kind: type["_Form"]) -> Response:
        started = time.monotonic()
        try:
            sampling = body.sampling(body.told)
            answer = await self.answerer.answer(body.model, body.prompt, body.most_tokens, body.stops, sampling)
        except UnknownModelError as error:
            raise refusal(404, str(error), "model") from None
        except (ValueError, FileNotFoundError) as error:
            raise refusal(400, str(error)) from None
        form, headers = kind(body, answer, self.answerer.tokenizer.decode), answer.choice.headers
        if self.limits.log_prompts:
            log.info("%s asks %s: %s", form.id, answer.choice.name, body.prompt)
        pieces = self._measured(form, answer, started)
        if body.stream:
            return _Stream(form.events(pieces), media_type="text/event-stream", headers=headers)
        whole = await _unless_gone(request, _joined(pieces))
        return JSONResponse(form.whole(whole), headers=headers)

    async def _measured(self, form: "_Form", answer: Answer, started: float) -> AsyncIterator[Piece]:
        """Yield the pieces of an answer until its time is over, and count them."""
        deadline = asyncio.get_running_loop().time() + self.limits.seconds - (time.monotonic() - started)
        piece: Piece | None = None
        text = ""
        try:
            async with aclosing(answer.pieces) as pieces:  # type: ignore[type-var]
                while piece is None or piece.finish is None:
                    async with asyncio.timeout_at(deadline):
                        following = await anext(pieces)
                    if piece is None:
                        self.measured.first_token.observe(time.monotonic() - started)
                    piece = following
                    text += piece.text
                    yield piece
        except TimeoutError:
            raise refusal(504, f"the answer took more than {self.limits.seconds:g} seconds") from None
        except EngineError as error:
            log.error("The model failed: %s", error)
            raise refusal(500, "the model failed; the log of the server says why") from None
        finally:
            finished = piece is not None and piece.finish is not None
            self.measured.count(answer, time.monotonic() - started, finished)
            if self.limits.log_prompts:
                log.info("%s is answered: %s", form.id, text)


class _Stream(StreamingResponse):
    """Server-sent events, of which the source ends when the client leaves, even while it is sent something."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self.body_iterator):  # type: ignore[type-var]
            await super().__call__(scope, receive, send)


class _Form:
    """The form of an answer, which says in its field `expert` and its headers who answered."""

    object, chunk, prefix = "", "", ""
    start: ClassVar[Any] = None
    """The choice with which a stream begins."""

    def __init__(
        self, body: ChatRequest | CompletionRequest, answer: Answer, decode: Callable[[list[int]], Any]
    ) -> None:
        self.id, self.created = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time())
        self.body, self.answer, self._decode = body, answer, decode

    def whole(self, piece: Piece) -> dict[str, Any]:
        """Return the answer in one piece."""
        return self._with([self.choice_of(piece, False)], self.object) | {"usage": self._usage}

    async def events(self, pieces: AsyncIterator[Piece]) -> AsyncIterator[str]:
        """Yield the answer as server-sent events."""
        try:
            async with aclosing(pieces):  # type: ignore[type-var]
                if self.start is not None:
                    yield _event(self._with([self.start]))
                async for piece in pieces:
                    yield _event(self._with([self.choice_of(piece, True)]))
                if self.body.stream_options is not None and self.body.stream_options.include_usage:
                    yield _event(self._with([]) | {"usage": self._usage})
                yield "data: [DONE]\n\n"
        except HTTPException as error:
            yield _event(error.detail)

    def _with(self, choices: list[dict[str, Any]], kind: str | None = None) -> dict[str, Any]:
        """Return an answer, or a part of one, that has these choices."""
        choice = self.answer.choice
        return {
            "id": self.id,
            "object": kind or self.chunk,
            "created": self.created,
            "model": self.body.model,
            "expert": choice.name,
            "confidence": choice.confidence,
            "choices": choices,
        }

    @property
    def _usage(self) -> dict[str, int]:
        read, written = self.answer.prompt_tokens, self.answer.tokens
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    def choice_of(self, piece: Piece, part: bool) -> dict[str, Any]:
        raise NotImplementedError

    def text_of(self, token: int) -> str:
        return str(self._decode([token]))


class _Chat(_Form):
    object, chunk, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"
    start: ClassVar[Any] = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}

    def choice_of(self, piece: Piece, part: bool) -> dict[str, Any]:
        message = {"content": piece.text} | ({} if part else {"role": "assistant", "refusal": None})
        told = {"content": [self._told(one) for one in piece.tokens]} if self.body.told is not None else None
        key = "delta" if part else "message"
        return {"index": 0, key: message, "finish_reason": piece.finish, "logprobs": told}

    def _told(self, token: Token) -> dict[str, Any]:
        def one(number: int, logprob: float | None) -> dict[str, Any]:
            text = self.text_of(number)
            return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

        return one(token.id, token.logprob) | {"top_logprobs": [one(*likely) for likely in token.likeliest]}


class _Completion(_Form):
    object, chunk, prefix = "text_completion", "text_completion", "cmpl"

    def choice_of(self, piece: Piece, part: bool) -> dict[str, Any]:
        told = None
        if self.body.told is not None:
            told = {
                "tokens": [self.text_of(one.id) for one in piece.tokens],
                "token_logprobs": [one.logprob for one in piece.tokens],
                "top_logprobs": [{self.text_of(one): p for one, p in token.likeliest} for token in piece.tokens],
            }
        return {"index": 0, "text": piece.text, "finish_reason": piece.finish, "logprobs": told}


class Guard:
    """Refuses requests that are too many, too large or do not know the key, and ends those that take too long."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self.app, self.limits, self.busy = app, limits, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        key, given = self.limits.api_key, dict(scope["headers"]).get(b"authorization", b"")
        known = key is None or hmac.compare_digest(given.removeprefix(b"Bearer ").strip(), key.encode())
        if not known and scope["path"] not in ("/", "/health"):
            return await _body(401, "give the server's key as Authorization: Bearer KEY")(scope, receive, send)
        if scope["method"] != "POST":
            return await self.app(scope, receive, send)
        if self.busy >= self.limits.requests:
            why = f"{self.busy} requests are being answered; try again later"
            return await _body(429, why, {"Retry-After": "1"})(scope, receive, send)
        self.busy += 1
        try:
            # An answer has less time; this ends requests whose client neither reads on nor leaves.
            async with asyncio.timeout(self.limits.seconds + 1):
                await self._pass(scope, receive, send)
        except TimeoutError:
            log.warning("A client took more than %g seconds to send or read; it is left", self.limits.seconds + 1)
        finally:
            self.busy -= 1

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the body, up to the limit, and hand the request on."""
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body, more = body + message.get("body", b""), message.get("more_body", False)
            if len(body) > self.limits.body:
                why = f"the request has more than {self.limits.body} bytes; shorten it"
                return await _body(413, why)(scope, receive, send)
        first: list[Message] = [{"type": "http.request", "body": body}]

        async def again() -> Message:
            return first.pop() if first else await receive()

        await self.app(scope, again, send)


async def _joined(pieces: AsyncIterator[Piece]) -> Piece:
    async with aclosing(pieces) as each:  # type: ignore[type-var]
        found = [piece async for piece in each]
    return Piece("".join(one.text for one in found), [t for one in found for t in one.tokens], found[-1].finish)


async def _unless_gone(request: Request, work: Awaitable[Any]) -> Any:
    """Wait for some work, and end it if the client leaves."""
    task = asyncio.ensure_future(work)
    try:
        while not task.done():
            await asyncio.wait([task], timeout=0.5)
            if not task.done() and await request.is_disconnected():
                raise refusal(499, "the client left")
        return task.result()
    finally:
        task.cancel()


def _listed(name: str, kind: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "modular-experts", "kind": kind}


def _event(content: Any) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def _detail(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    code = {401: "invalid_api_key", 404: "model_not_found", 429: "rate_limit_exceeded"}.get(status)
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def refusal(status: int, message: str, param: str | None = None) -> HTTPException:
    """Return an error that ends a request with one sentence."""
    return HTTPException(status, _detail(status, message, param))


def _body(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse(_detail(status, message), status, headers)


def send_refusal(request: Request, error: Any) -> JSONResponse:
    """Answer with an error in the form that clients of OpenAI read."""
    detail = error.detail if isinstance(error.detail, dict) else _detail(error.status_code, str(error.detail))
    return JSONResponse(detail, error.status_code, error.headers)


def _refuse_fields(request: Request, error: Any) -> JSONResponse:
    return send_refusal(request, refusal(400, *sentence(error.errors())))
