"""Choose the expert by the prompt in front of another server, such as vLLM or SGLang with the experts as LoRAs.

Requests for `auto` get the name of the expert that the library's route chooses; all else passes as it is, both ways.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import httpx
from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException as StarletteHTTPException
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from modular_experts.injection import context_length
from modular_experts.language_model import blocks_of
from modular_experts.serving.answers import read_prompt
from modular_experts.serving.app import Guard, Limits, Stream, refusal, send_refusal
from modular_experts.serving.engine import SideThreads
from modular_experts.serving.models import AUTO, BASE, ChosenExperts, Models, Route
from modular_experts.serving.requests import ROLES

# Headers that belong to one connection, or that httpx writes itself.
_OWN = {"connection", "host", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade"}
Headers = list[tuple[str, str]]


def make_proxy(
    models: Models, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, upstream: str, limits: Limits
) -> FastAPI:
    """Return the application, which keeps of the base what the route reads: the embeddings and the first blocks.

    `upstream` is the address of the other server, without `/v1`; a request's key is handed on.
    """
    client = httpx.AsyncClient(
        base_url=upstream,
        timeout=httpx.Timeout(limits.seconds, connect=10, pool=0.01),
        limits=httpx.Limits(max_connections=limits.requests),
        trust_env=False,
        headers={"accept-encoding": "identity"},  # answers are not compressed unless the client asks for it
    )
    proxy = _Proxy(models, model, tokenizer, client)

    @asynccontextmanager
    async def running(app: FastAPI) -> AsyncIterator[None]:
        async with client:
            yield

    app = FastAPI(title="modular-experts", lifespan=running)
    app.add_middleware(Guard, limits=limits)
    app.add_exception_handler(StarletteHTTPException, send_refusal)
    for path in ("/v1/{rest:path}", "/health", "/metrics"):
        app.add_api_route(path, proxy.forward, methods=["GET", "POST"], response_model=None)
    return app


class _Proxy:
    """The endpoints; the model is the base, which reads prompts for the route."""

    def __init__(
        self, models: Models, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, client: httpx.AsyncClient
    ) -> None:
        self.models = models
        self.model = model
        self.tokenizer = tokenizer
        self.client = client
        self.choosing = SideThreads()
        # How the other server calls its models; read at the first need of it.
        self.ids: Sequence[str] = ()
        self.joins = False
        route = models.find(AUTO)
        assert isinstance(route, Route)
        self.depth = max(route.depths)
        # Free the weights that the route does not read.
        blocks = blocks_of(model)
        unread = blocks[round(self.depth * len(blocks)) :]
        if hasattr(model, "lm_head"):
            unread.append("lm_head")
        for name in unread:
            model.get_submodule(name).to("meta")

    async def forward(self, request: Request) -> Stream:
        """Send a request to the other server, with the route's choice in place of `auto`."""
        if ".." in request.url.path.split("/"):
            raise refusal(404, "only what lies below /v1 is passed on")
        body = await request.body()
        headers_of_choice: dict[str, str] = {}
        headers = [(name, value) for name, value in request.headers.items() if name not in _OWN | {"content-length"}]
        asked: Any = None
        with suppress(ValueError, RecursionError):
            asked = json.loads(body)
        if isinstance(asked, dict) and asked.get("model") == AUTO:
            choice = await self._choose(asked)
            body = json.dumps(asked | {"model": await self._name(choice.name, headers)}).encode()
            headers_of_choice = choice.headers
        url = httpx.URL(path=request.url.path, query=request.url.query.encode())
        answer = await self._send(request.method, url, headers, body)
        kept = {name: value for name, value in answer.headers.items() if name not in _OWN}
        headers_of_answer = kept | headers_of_choice
        return Stream(answer.aiter_raw(), answer, headers=headers_of_answer, status_code=answer.status_code)

    async def _choose(self, asked: Mapping[str, Any]) -> ChosenExperts:
        """Return what the route chooses for the prompt of a request."""
        try:
            prompt = asked.get("prompt")
            if prompt is None:
                prompt = [_message(message) for message in asked["messages"]]
            elif isinstance(prompt, list) and isinstance(prompt[0], str | list):
                if len(prompt) > 1:
                    raise ValueError("it has several, and one expert answers them all; send one in each request")
                prompt = prompt[0]
            route, readings = await asyncio.to_thread(read_prompt, self.models, self.tokenizer, AUTO, prompt)
            if not isinstance(route, Route):
                raise ValueError(f"{AUTO} names no route any more")
            if max(route.depths) > self.depth:
                raise ValueError("it reads more of the base than the one before; start the proxy again")
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise refusal(400, f"the route cannot read the prompt of the request: {str(error)[:200]}") from None
        context = context_length(self.model)
        shortened = {form: reading._replace(ids=reading.ids[:context]) for form, reading in readings.by_form.items()}
        choice, _ = await self.choosing.call(route.choose, self.model, readings._replace(by_form=shortened))
        return choice

    async def _name(self, name: str, headers: Headers) -> str:
        """Return how the other server calls an expert, or the base."""
        try:
            if not self.ids:
                answer = await self._send("GET", httpx.URL("/v1/models"), headers)
                listed = json.loads(await answer.aread())["data"]
                self.ids = [str(model["id"]) for model in listed]
                self.joins = listed[0].get("owned_by") == "sglang"
            base = self.ids[0]
        except (LookupError, TypeError, ValueError):
            raise refusal(502, f"the server at {self.client.base_url} does not list its models") from None
        if name == BASE:
            return BASE if BASE in self.ids else base
        # To SGLang an adapter's name alone means the base.
        return f"{base}:{name}" if self.joins else name

    async def _send(self, method: str, url: httpx.URL, headers: Headers, body: bytes = b"") -> httpx.Response:
        request = self.client.build_request(method, url, headers=headers, content=body)
        try:
            return await self.client.send(request, stream=True)
        except httpx.PoolTimeout:
            raise refusal(429, "too many requests are being answered; try again later") from None
        except httpx.HTTPError as error:
            message = f"the server at {self.client.base_url} does not answer ({type(error).__name__})"
            raise refusal(502, message) from None


def _message(message: Mapping[str, Any]) -> dict[str, str]:
    """Return the role and the text of a message, without its pictures and calls."""
    role = message["role"]
    content = message.get("content")
    text = content if isinstance(content, str) else "".join(part.get("text", "") for part in content or ())
    return {"role": ROLES.get(role, str(role)), "content": text}
