"""What it costs to answer over HTTP with an expert for each client, beside the base and beside PEFT.

Servers answer the same prompts with SmolLM2 and random experts, in turn, each in a process of its own; the clients are
in this one. The numbers are ratios of medians over rounds:

* base: `transformers serve --continuous-batching`, with the base alone;
* PEFT: LoRAs of rank 16 in one PEFT model, whose `generate` takes `adapter_names` by row, behind FastAPI, which answers
  all requests that wait as one batch;
* ours: `modular-experts serve`, with entries and tiles of 5 % in int4, with those LoRAs, and with them cut to rank 2
  in int4, as `shrink` stores them.

Work is counted in CPU seconds of the server for each token, which other programs on the machine hardly change; the time
to the first token, and to the end of an answer, is the clock's. Memory is the server's (PSS) when it has answered with
20 experts, and with each of 1,000 that lie in the library, where 100 fit into `--expert_bytes`.

    python benchmarks/serving.py BASE [--json] [--quick]    half an hour; --quick: in small, to see that it runs
    python benchmarks/serving.py BASE --soak MINUTES        50 clients that come and go, while experts are replaced
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import torch
from measuring import Parser, output, print_machine
from routing_cost import RandomExpert

from modular_experts.base import Base
from modular_experts.data import TaskMixture
from modular_experts.library import Library, make_record, open_expert, write_expert
from modular_experts.library.form import Form
from modular_experts.merging.route import route
from modular_experts.routing import Centroid

WORDS = ["the", "card", "was", "lost", "at", "a", "bank", "in", "Paris", "and", "who", "knows", "how", "it", "went"]
TOKENS = 24
SHRUNK = "shrunk-LoRA"
KINDS = {"entries": "int4", "tiles": "int4", "LoRA": "float32", SHRUNK: "int4"}
"""The experts that are served, and how their values are stored."""


def prompt_of(number: int) -> str:
    """Return a prompt of about 48 tokens."""
    return " ".join(random.Random(number).choices(WORDS, k=40))


class Server:
    """A server in a process of its own, at a free port."""

    def __init__(self, command: list[str], model: Callable[[int], str], port: int | None = None) -> None:
        self.model, self.log = model, tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by `stop`
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log)
        while port is None:
            self.log.seek(0)
            found = re.search(r"http://127\.0\.0\.1:(\d+)", self.log.read())
            port = int(found[1]) if found else None
            self._check()
        self.address = f"http://127.0.0.1:{port}"
        with httpx.Client(base_url=self.address) as client:
            while not self._answers(client):
                self._check()

    def _answers(self, client: httpx.Client) -> bool:
        try:
            return client.get("/health").status_code == 200
        except httpx.TransportError:
            return False

    def _check(self) -> None:
        time.sleep(0.2)
        if self.process.poll() is not None:
            self.log.seek(0)
            raise SystemExit(self.log.read())

    def cpu(self) -> float:
        """Return the CPU seconds that its process has taken."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory(self, kind: str = "Pss") -> int:
        """Return the bytes of memory that it has, with its part of shared pages, or (`Rss`) with all of each."""
        text = Path(f"/proc/{self.process.pid}/smaps_rollup").read_text()
        return 1024 * int(re.search(rf"^{kind}:\s+(\d+)", text, re.M)[1])  # type: ignore[index]

    def stop(self) -> None:
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        self.process.kill()
        self.process.wait()
        self.log.close()


@contextlib.contextmanager
def started(**commands: tuple[list[str], Callable[[int], str], int | None]) -> Iterator[dict[str, Server]]:
    servers = {name: Server(*one) for name, one in commands.items()}
    try:
        yield servers
    finally:
        for server in servers.values():
            server.stop()


async def ask(client: httpx.AsyncClient, model: str, number: int, tokens: int) -> tuple[int, float]:
    """Return the tokens of an answer, and the seconds that it took."""
    begun = time.perf_counter()
    body = {"model": model, "prompt": prompt_of(number), "max_tokens": tokens, "temperature": 0}
    answer = await client.post("/v1/completions", json=body)
    answer.raise_for_status()
    return answer.json()["usage"]["completion_tokens"], time.perf_counter() - begun


async def first_token(client: httpx.AsyncClient, model: str, number: int) -> float:
    """Return the seconds to the first text of a streamed answer."""
    begun = time.perf_counter()
    body = {"model": model, "prompt": prompt_of(number), "max_tokens": 4, "stream": True}
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        async for _ in answer.aiter_lines():
            return time.perf_counter() - begun
    raise AssertionError


async def load(server: Server, clients: int, experts: int, each: int, tokens: int) -> dict[str, float]:
    """Let clients ask, each its own expert, and return CPU seconds of a token and the times of answers."""

    async def one(client: httpx.AsyncClient, number: int) -> list[tuple[int, float]]:
        model = server.model(number % experts)
        return [await ask(client, model, 100 * number + turn, tokens) for turn in range(each)]

    async with httpx.AsyncClient(base_url=server.address, timeout=None) as client:
        before, begun = server.cpu(), time.perf_counter()
        found = [
            pair for several in await asyncio.gather(*(one(client, n) for n in range(clients))) for pair in several
        ]
        work, wall = server.cpu() - before, time.perf_counter() - begun
    written, times = sum(count for count, _ in found), sorted(seconds for _, seconds in found)
    return {
        "cpu": work / written,
        "wall": wall / written,
        "p50": statistics.median(times),
        "p99": times[min(int(0.99 * len(times)), len(times) - 1)],
    }


def write_library(base: Base, place: Path, count: int, many: int = 0, forms: Sequence[str] = tuple(KINDS)) -> None:
    """Write random experts of some kinds, and perhaps many small ones."""
    model = base.structure.model
    of = {"id": base.place, "revision": None, "fingerprint": base.fingerprint}
    for kind, encoding in [(kind, KINDS[kind]) for kind in forms]:
        for number in range(count):
            expert = RandomExpert(model, "LoRA" if kind == SHRUNK else kind, number)
            cut = {name: Form("int4", rank=2).cut(expert[name]) for name in expert} if kind == SHRUNK else expert
            record = make_record("SparseExpert", of, tasks=[f"{number}"])
            write_expert(place / f"{kind}-{number}", cut, record, encoding=encoding)
    for number in range(many):
        expert = RandomExpert(model, "LoRA", number)
        expert.shapes = {name: shape for name, shape in expert.shapes.items() if "q_proj" in name or "v_proj" in name}
        write_expert(place / f"small-{number}", expert, make_record("LoRAExpert", of), encoding="int4")


def add_route(base: Base, place: Path, count: int) -> None:
    """Put the experts of entries behind a router, which learns them from prompts of their own."""
    tasks: list[Any] = []
    for number in range(count):
        file = place.parent / f"{number}.jsonl"
        rows = [{"input": f"{number} {prompt_of(100 * number + row)}", "target": "x"} for row in range(16)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        tasks.append({"name": f"{number}", "path": str(file)})
    experts = [place / f"entries-{number}" for number in range(count)]
    route(experts, place / "route", Centroid(reject=None), data=TaskMixture(tasks, tokenizer=base.place))


def ours(place: Path, base: str, *words: str) -> list[str]:
    command = [sys.executable, "-m", "modular_experts", "serve", str(place), "--base", base, "--port", "0"]
    return [*command, "--expert_bytes", "4GB", *words]


def peers(base: str, place: Path) -> dict[str, tuple[list[str], Callable[[int], str], int | None]]:
    program = str(Path(sys.executable).with_name("transformers"))
    cached = ["--continuous-batching", "--cb-block-size", "32", "--cb-num-blocks", "512", "--dtype", "float32"]
    command = [program, "serve", base, *cached, "--host", "127.0.0.1", "--port", "8471"]
    peft = [sys.executable, __file__, base, "--peft", str(place), "--port", "8472"]
    return {"base": (command, lambda _: base, 8471), "PEFT": (peft, lambda number: f"LoRA-{number}", 8472)}


def throughput(
    base: str, place: Path, quick: bool, rounds: int, numbers: Sequence[int], forms: Sequence[str]
) -> list[dict[str, Any]]:
    """Return a row for each server, number of clients and number of experts."""
    several, rows = (2,) if quick else (1, 8, 20), []
    kinds = {kind: (ours(place, base), lambda number, kind=kind: f"{kind}-{number}", None) for kind in forms}
    with started(**peers(base, place), **kinds) as servers:
        for clients in numbers:
            cases = [(name, count) for name in servers for count in (several if name != "base" else several[:1])]
            cases = [(name, count) for name, count in cases if count <= max(clients, several[0])]
            found: dict[tuple[str, int], list[dict[str, float]]] = {case: [] for case in cases}
            for turn in range(rounds + 1):
                for name, count in random.Random(turn).sample(cases, len(cases)):
                    each = 1 if quick else max(2, 8 // clients)
                    result = asyncio.run(load(servers[name], clients, count, each, 4 if quick else TOKENS))
                    print(f"{clients} clients, {name}, {count} experts: {result}", file=sys.stderr, flush=True)
                    if turn:
                        found[name, count].append(result)
            middle = {
                case: {key: statistics.median(one[key] for one in several) for key in several[0]}
                for case, several in found.items()
            }
            floor = middle["base", several[0]]
            for (name, count), result in middle.items():
                over = {key: value / floor[key] for key, value in result.items()}
                rows.append({"server": name, "clients": clients, "experts": 0 if name == "base" else count} | over)
    return rows


def choosing(base: str, place: Path, quick: bool) -> dict[str, float]:
    """Return the time to the first token where the router chooses, over that where the client names the expert."""

    async def both(server: Server) -> dict[str, float]:
        found: dict[str, list[float]] = {"named": [], "auto": []}
        async with httpx.AsyncClient(base_url=server.address, timeout=None) as client:
            for number in range(4 if quick else 44):
                for kind, times in random.Random(number).sample([*found.items()], 2):
                    model = "auto" if kind == "auto" else f"entries-{number % 2}"
                    times.append(await first_token(client, model, 100 * (number % 2) + number))
        return {kind: statistics.median(times[2:]) for kind, times in found.items()}

    with started(ours=(ours(place, base, "--auto", "route"), str, None)) as servers:
        found = asyncio.run(both(servers["ours"]))
    return {"auto over named": found["auto"] / found["named"]}


def memory(base: str, place: Path, quick: bool) -> list[dict[str, Any]]:
    """Return the growth of the server's memory over the base's bytes, as it answers with more and more experts."""
    small = sorted(name for name in Library(place) if name.startswith("small-"))
    size = sum(open_expert(place / small[0]).stored_bytes().values())
    # Keys and values would grow until each of their pages has been used once.
    words = ["--expert_bytes", str((5 if quick else 100) * size + 1), "--cache_tokens", "256"]

    async def answer(server: Server, names: list[str]) -> int:
        async with httpx.AsyncClient(base_url=server.address, timeout=None) as client:
            for number, name in enumerate(names):
                await ask(client, name, number, 2)
        return server.memory()

    with started(ours=(ours(place, base, *words), str, None)) as servers:
        server, rows = servers["ours"], []
        empty = asyncio.run(answer(server, ["base"]))
        for names in (small[:20], small):
            grown = asyncio.run(answer(server, names)) - empty
            rows.append(
                {"experts": len(names), "grown over their bytes": grown / (len(names) * size), "MB": grown / 1e6}
            )
    return rows


def soak(base: str, place: Path, minutes: float) -> dict[str, Any]:
    """Let 50 clients ask and leave at random while experts are replaced, and count errors and growth of memory."""
    names = [f"LoRA-{number}" for number in range(8)] + ["entries-0+0.5*tiles-1", "base"]
    draw, errors, answers, sizes = random.Random(0), list[str](), 0, list[int]()

    async def client(number: int, server: Server, end: float) -> None:
        nonlocal answers
        async with httpx.AsyncClient(base_url=server.address, timeout=None) as asking:
            while time.monotonic() < end:
                limit = draw.uniform(0.1, 5) if draw.random() < 0.3 else None
                try:
                    async with asyncio.timeout(limit):
                        await ask(asking, draw.choice(names), draw.randrange(10**6), draw.randint(1, 24))
                    answers += 1
                except TimeoutError:
                    pass
                except httpx.HTTPError as error:
                    errors.append(f"{type(error).__name__}: {error}"[:200])

    async def replace(end: float) -> None:
        model = Base.open(base).structure.model
        while time.monotonic() < end:
            await asyncio.sleep(2)
            number = draw.randrange(8)
            record = open_expert(place / f"LoRA-{number}").record
            expert = RandomExpert(model, "LoRA", draw.randrange(1000))
            await asyncio.to_thread(write_expert, place / f"LoRA-{number}", expert, record, True)

    async def watch(server: Server, end: float) -> None:
        while time.monotonic() < end:
            await asyncio.sleep(5)
            # Others that read the base in these minutes would take a part of it.
            sizes.append(server.memory("Rss"))

    async def all_of_it(server: Server) -> None:
        end = time.monotonic() + 60 * minutes
        await asyncio.gather(*(client(n, server, end) for n in range(50)), replace(end), watch(server, end))

    # All pages of keys and values are used before: freed ones are used again first, so that rare crowds would add some.
    with started(ours=(ours(place, base, "--cache_tokens", "4096"), "LoRA-{}".format, None)) as servers:
        asyncio.run(load(servers["ours"], 32, 8, 1, 100))
        asyncio.run(all_of_it(servers["ours"]))
    first = statistics.median(sizes[min(12, len(sizes) // 5) :][:6])
    return {"answers": answers, "errors": errors[:5], "growth": statistics.median(sizes[-6:]) / first - 1}


def serve_peft(base: str, place: Path, port: int) -> None:
    """Answer with LoRAs in one PEFT model: all requests that wait are one batch."""
    import peft
    import uvicorn
    from fastapi import FastAPI

    from modular_experts.interop.peft import export

    opened = Base.open(base)
    tokenizer, model = opened.tokenizer(), None
    with tempfile.TemporaryDirectory() as folder:
        for name in sorted(name for name in Library(place) if name.startswith("LoRA-")):
            export(place / name, Path(folder) / name)
            if model is None:
                model = peft.PeftModel.from_pretrained(opened.load("float32"), Path(folder) / name, adapter_name=name)
            else:
                model.load_adapter(Path(folder) / name, adapter_name=name)
    waiting: list[tuple[dict[str, Any], asyncio.Future[int]]] = []
    come = asyncio.Event()

    @torch.no_grad()
    def answers(bodies: list[dict[str, Any]]) -> list[int]:
        rows = tokenizer([body["prompt"] for body in bodies], return_tensors="pt", padding=True, padding_side="left")
        most = max(body["max_tokens"] for body in bodies)
        names = [body["model"] for body in bodies]
        made = model.generate(**rows, adapter_names=names, max_new_tokens=most, do_sample=False)  # type: ignore[union-attr]
        return [made.shape[1] - rows["input_ids"].shape[1]] * len(bodies)

    async def work() -> None:
        while True:
            await come.wait()
            batch, waiting[:] = waiting[:32], waiting[32:]
            come.clear()
            for (_, future), count in zip(batch, await asyncio.to_thread(answers, [b for b, _ in batch]), strict=True):
                future.set_result(count)
            if waiting:
                come.set()

    @contextlib.asynccontextmanager
    async def running(app: FastAPI) -> Any:
        task = asyncio.create_task(work())
        yield
        task.cancel()

    app = FastAPI(lifespan=running)

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/v1/completions")
    async def complete(body: dict[str, Any]) -> dict[str, Any]:
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        waiting.append((body, future))
        come.set()
        return {"usage": {"completion_tokens": await future}}

    uvicorn.run(app, port=port, log_level="error")


def main() -> None:
    parser = Parser(__doc__, quick="few clients and tokens: the numbers mean nothing")
    parser.add_argument("base", help="directory of SmolLM2, which make smollm2 fetches")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--kinds", nargs="+", default=[*KINDS], choices=[*KINDS], help="of the experts")
    parser.add_argument("--soak", type=float, help="minutes")
    parser.add_argument("--only", nargs="+", default=["throughput", "first token", "memory"], help="parts")
    parser.add_argument("--peft", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peft:
        serve_peft(options.base, options.peft, options.port)
        return
    base, quick = Base.open(options.base), options.quick
    with tempfile.TemporaryDirectory() as folder:
        place, parts = Path(folder) / "library", options.only
        count = 2 if quick else max(2, min(20, max(options.clients)))
        if options.soak:
            write_library(base, place, 8, forms=["LoRA"])
            write_library(base, place, 2, forms=["entries", "tiles"])
            print(soak(options.base, place, options.soak))
            return
        # PEFT serves the LoRAs, and the router chooses among the entries.
        needed = [*options.kinds, "LoRA"] if "throughput" in parts else []
        needed += ["entries"] if "first token" in parts else []
        write_library(base, place, count, (20 if quick else 1000) if "memory" in parts else 0, [*{*needed}])
        report: dict[str, Any] = {}
        if "throughput" in parts:
            report["throughput"] = throughput(
                options.base,
                place,
                quick,
                1 if quick else options.rounds,
                [1] if quick else options.clients,
                options.kinds,
            )
        if "first token" in parts:
            add_route(base, place, 2)
            report["first token"] = choosing(options.base, place, quick)
        if "memory" in parts:
            report["memory"] = memory(options.base, place, quick)
    output(options, report, show)


def show(report: dict[str, Any]) -> None:
    """Print the tables."""
    print_machine(report)
    print("over the base\n\n| server | clients | experts | CPU of a token | time of a token | p50 | p99 |")
    print("|---|---|---|---|---|---|---|")
    for row in report.get("throughput", []):
        cells = " | ".join(f"{row[key]:.2f}" for key in ("cpu", "wall", "p50", "p99"))
        print(f"| {row['server']} | {row['clients']} | {row['experts'] or ''} | {cells} |")
    for name, value in report.get("first token", {}).items():
        print(f"\ntime to the first token, {name}: {value:.2f}")
    print("\n| experts that answered | growth of memory over their bytes |\n|---|---|")
    for row in report.get("memory", []):
        print(f"| {row['experts']} | {row['grown over their bytes']:.2f} |")


if __name__ == "__main__":
    main()
