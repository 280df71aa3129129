"""Run `modular-experts serve`, which answers requests with the experts of a library."""

import logging
import os
import socket
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modular_experts.base import Base, DType
from modular_experts.base.device import device
from modular_experts.base.quantised import Quantise
from modular_experts.cli.option_names import as_options
from modular_experts.library import Library
from modular_experts.study.options import UsageError
from modular_experts.text import bytes_of

if TYPE_CHECKING:
    from modular_experts.serving.models import Models

KEY = "MODULAR_EXPERTS_API_KEY"
URL = str
THIS_MACHINE = ("127.0.0.1", "::1", "localhost")
"""Addresses that no other machine reaches."""


def serve(
    library: str,
    base: str | None = None,
    auto: str | None = None,
    in_front_of: URL | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    rows: int = 32,
    cache_tokens: int = 16384,
    expert_bytes: str = "2GB",
    most_requests: int = 256,
    seconds: float = 600.0,
    dtype: DType = "float32",
    quantise: Quantise | None = None,
    log_prompts: bool = False,
    samples: list[str] | None = None,
) -> None:
    """Answer requests over HTTP with the experts of a library, in OpenAI's protocol.

    The `model` of a request names an expert, a merge, a sum such as a+0.5*b, a route, base, or auto, for which the
    library's only route reads the prompt and finds the expert; the page starts with auto, or with the base if the
    library has not exactly one. Experts that join the library are served without a restart.
    With --in_front_of, another server answers, such as vLLM: this one only chooses the expert of requests for auto.
    At / there is a page on which to ask. With a key in MODULAR_EXPERTS_API_KEY, requests must send it.

    Args:
        library: Directory of the experts.
        auto: The route that auto means; by default the only one of the library.
        in_front_of: Address of another server, such as http://127.0.0.1:9000, which has the experts by their names.
        host: Address to listen at; 0.0.0.0 lets other machines ask.
        port: Port to listen at; 0 takes a free one.
        rows: The most answers that are written at the same time; others wait.
        cache_tokens: The most tokens of prompts and answers that are in work together.
        expert_bytes: The most bytes of experts in memory; those that nobody asked for lately leave.
        most_requests: The most requests that are answered or wait; more are refused.
        seconds: The most time of an answer, with waiting.
        log_prompts: Write prompts and answers to the log.
        samples: Prompts that the page offers to try. By default one of each task whose inputs an expert keeps (fit
            --keep_inputs), if only this machine or who has the key can see them.

    Examples:
        modular-experts serve library
        modular-experts serve library --auto route --port 9000
        modular-experts serve library --in_front_of http://127.0.0.1:9000
    """
    try:
        import uvicorn

        from modular_experts.serving.answers import Answerer
        from modular_experts.serving.app import Limits, make_app
        from modular_experts.serving.engine import Engine
        from modular_experts.serving.models import Models
        from modular_experts.serving.proxy import make_proxy
        from modular_experts.serving.samples import sample_prompts
    except ImportError as error:
        raise UsageError(f"serve needs {error.name}: pip install 'modular-experts[serve]'") from None
    _set_up_logs(log_prompts)
    if not 0 <= port < 2**16:
        raise UsageError(f"--port {port} is outside 0 to 65535; 0 takes a free one")
    if min(rows, cache_tokens, most_requests, seconds) < 1:
        raise UsageError("--rows, --cache_tokens, --most_requests and --seconds must be at least 1")
    experts = Library(library, base)
    first = [] if base else [*islice(experts.readable(), 1)]
    if not (first or base):
        raise UsageError(f"{library} has no experts; give --base to begin without, or fit one: --out {library}/NAME")
    # No model is loaded for an address that is taken.
    with _bound(host, port) as listening, ExitStack() as ends:
        opened = Base.open(base, first, quantise=quantise)
        models = Models(library, opened.fingerprint, opened.place, auto)
        if in_front_of and models.auto is None:
            models.find("auto")
        # The annotations of transformers are too narrow.
        model: Any = opened.load(dtype)
        tokenizer: Any = opened.tokenizer()
        api_key = os.environ.get(KEY) or None
        # Kept inputs are training data, which strangers may not see.
        if samples is None and (api_key or host in THIS_MACHINE):
            samples = list(sample_prompts(experts.readable(adapters=False), tokenizer).values())
        limits = Limits(most_requests, seconds, api_key=api_key, log_prompts=log_prompts, samples=tuple(samples or ()))
        if in_front_of:
            app = make_proxy(models, model, tokenizer, in_front_of.rstrip("/").removesuffix("/v1"), limits)
        else:
            engine = Engine(model.to(device()), rows, cache_tokens, bytes_of(expert_bytes))
            ends.callback(engine.stop)
            engine.check_base()
            app = make_app(Answerer(models, engine, tokenizer), limits)
        _print_what_is_served(models, opened, Path(library))
        print(f"answers at http://{host}:{listening.getsockname()[1]}/v1; Ctrl-C ends it", flush=True)
        config = uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=int(seconds), server_header=False)
        uvicorn.Server(config).run(sockets=[listening])


def _set_up_logs(log_prompts: bool) -> None:
    # It warns of each piece of an answer whose client has just left.
    logging.getLogger("asyncio").setLevel(logging.ERROR)
    if log_prompts:
        served = logging.getLogger("modular_experts.serving")
        served.setLevel(logging.INFO)
        served.addHandler(logging.StreamHandler())


def _print_what_is_served(models: "Models", opened: Base, library: Path) -> None:
    count = len(models.listed()) - 1
    auto = models.auto or f"not there: {models.why_no_auto}"
    print(as_options(f"{opened.place} with {count} models of {library}; auto is {auto}"))


def _bound(host: str, port: int) -> socket.socket:
    """Return a socket at an address, before a model is loaded for it."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise UsageError(f"nothing can listen at {host}:{port} ({error}); choose another --port or --host") from None
