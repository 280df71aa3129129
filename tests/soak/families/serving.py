"""Ask a server for several answers at once, and train and score conversations."""

import asyncio
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import torch

from modular_experts import Base, TaskMixture, fit, generate, route
from modular_experts.routing import Centroid, KernelRidge
from modular_experts.serving.answers import Answerer
from modular_experts.serving.app import make_app
from modular_experts.serving.engine import Engine
from modular_experts.serving.models import Models
from soak import bases
from soak.case import Case
from soak.experts import linear_weights, random_expert
from soak.fitting import Watch, check_fit, check_rows, random_kind, random_modules, trainer_of
from soak.reading import ConversationReader, Reader
from soak.reference.files import read_expert
from soak.reference.model import Reference
from soak.scoring import LEAST_LEAD, check_scores, measured
from soak.tasks import Row, TaskFile, random_row, random_task, random_word

SERVED = [kind for kind in bases.KINDS if kind not in ("neox", "gemma2", "chat")]
"""Bases that the server takes; the chat template is not for prompts without one."""
Asked = dict[str, Any]


def serving(case: Case) -> None:
    """Ask for the answers of several models at once: each is as it is alone, and as the reference's."""
    draw = case.random
    kind = draw.choice(SERVED)
    base = bases.base_of(kind)
    library = case.folder / "library"
    forms = draw.choice([["low"], ["dense"], ["sparse", "tiles"], ["dense", "low", "sparse", "tiles"]])
    weights = linear_weights(kind)
    count = draw.randint(2, 4)
    for number in range(count):
        names = draw.sample(weights, draw.randint(1, min(4, len(weights))))
        encoding = draw.choice(["float32", "bfloat16", "int8", "int4"])
        random_expert(case, kind, library / f"e{number}", forms, encoding, names, [f"t{number}"])
    is_routed = case.chance(0.3)
    if is_routed:
        tasks = [str(random_task(case, f"t{number}").path) for number in range(2)]
        router = draw.choice([Centroid, KernelRidge])(reject=None)
        route(
            [str(library / f"e{number}") for number in range(2)], library / "routed", router, None, TaskMixture(tasks)
        )
    limits = {"rows": draw.choice([1, 3, 32]), "cache_tokens": draw.choice([320, 16_384])}
    limits["expert_bytes"] = draw.choice([60_000, 2**30])
    case.note(base=kind, forms=forms, experts=count, is_routed=is_routed, **limits)
    asked = [random_request(case, count, is_routed) for _ in range(draw.randint(3, 10))]
    together, alone = asyncio.run(answers(base, library, asked, limits))

    reference_of: dict[str, Reference] = {}
    reader = Reader(base, bases.CONTEXT)
    for request, answer, lonely in zip(asked, together, alone, strict=True):
        place = json.dumps(request)
        mine, others = answer["choices"][0], lonely["choices"][0]
        for part in ("text", "finish_reason"):
            case.need(mine[part] == others[part], f"{place}: {mine[part]!r}, alone {others[part]!r}")
        case.need(answer["usage"] == lonely["usage"], f"{place}: {answer['usage']}, alone {lonely['usage']}")
        if request.get("temperature"):
            continue
        name = answer["expert"]
        reference = reference_of.setdefault(name, summed(base, library, name))
        ids = reader.ids(request["prompt"])
        wanted, lead = reference.answer(ids, request["max_tokens"])
        # An answer that its length ends within a character leaves this character out.
        text = wanted.rstrip("\ufffd") if mine["finish_reason"] == "length" else wanted
        stops = [text.find(stop) for stop in request.get("stop", []) if stop in text]
        if stops:
            text = text[: min(stops)]
        same = mine["text"].strip() == text.strip() or lead <= LEAST_LEAD
        case.need(same, f"{place}: {mine['text']!r} of {name}, the reference {text!r}")
        case.need(answer["usage"]["prompt_tokens"] == len(ids), f"{place}: {answer['usage']} for {len(ids)} tokens")
        if name in ("base", "e0", "e1") and not stops:
            experts = [] if name == "base" else [str(library / name)]
            text = generate(str(base), request["prompt"], experts, request["max_tokens"], chat_template=False)
            text = text.rstrip("\ufffd") if mine["finish_reason"] == "length" else text
            same = mine["text"].strip() == text or lead <= LEAST_LEAD
            case.need(same, f"{place}: {mine['text']!r}, generate {text!r}")
        if request.get("logprobs") and lead > LEAST_LEAD:
            check_logprobs(case, reference, ids, mine, reader)


def random_request(case: Case, count: int, is_routed: bool) -> Asked:
    """Draw a request for the base, an expert, a sum, or the route."""
    draw = case.random
    names = ["base", "e0", "e1", f"e{count - 1}", "e0+0.5*e1", "e0+e1", f"-1*e0+e{count - 1}"]
    prompt = random_row(case, "test", long=case.chance(0.4))["input"] * draw.choice([1, 1, 3])
    request: Asked = {"model": draw.choice([*names, "auto"] if is_routed else names), "prompt": prompt}
    request["max_tokens"] = draw.randint(1, 12)
    if case.chance(0.2):
        request |= {
            "temperature": draw.choice([0.7, 1.5]),
            "seed": draw.randrange(100),
            "top_p": draw.choice([1.0, 0.8]),
        }
    if case.chance(0.2):
        request["logprobs"] = draw.choice([1, 3])
    if case.chance(0.2):
        request["stop"] = draw.sample("abcdefghij ,.;/$&", 3)
    return request


async def answers(
    base: Path, library: Path, asked: Sequence[Asked], limits: dict[str, int]
) -> tuple[list[Asked], list[Asked]]:
    """Return the answers to requests that come at once, and to each alone."""
    opened = Base.open(str(base))
    engine = Engine(opened.load("float32"), **limits)
    answerer = Answerer(Models(library, opened.fingerprint, str(base)), engine, opened.tokenizer())
    transport = httpx.ASGITransport(make_app(answerer))
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://server", timeout=60) as client:

            async def answer(request: Asked) -> Asked:
                response = await client.post("/v1/completions", json=request)
                if response.status_code != 200:
                    raise ValueError(f"{response.status_code}: {response.text}")
                return response.json()

            together = await asyncio.gather(*map(answer, asked))
            alone = [await answer(request) for request in asked]
        return list(together), alone
    finally:
        await asyncio.to_thread(engine.stop)


def summed(base: Path, library: Path, name: str) -> Reference:
    """Return the reference of a model's name, such as `e0+0.5*e1`."""
    reference = Reference(base, bases.CONTEXT)
    for term in [] if name == "base" else name.split("+"):
        factor, _, expert = term.rpartition("*")
        deltas = read_expert(library / expert)
        reference.add({weight: float(factor or 1) * delta.values for weight, delta in deltas.items()})
    return reference


def check_logprobs(case: Case, reference: Reference, ids: Sequence[int], choice: Asked, reader: Reader) -> None:
    """Compare the probabilities of the tokens of an answer."""
    read = list(ids)
    for text, ours in zip(choice["logprobs"]["tokens"], choice["logprobs"]["token_logprobs"], strict=True):
        with torch.no_grad():
            shares = reference.logits(torch.tensor([read]))[0, -1].log_softmax(-1)
        token = int(shares.argmax())
        case.need(abs(ours - shares[token].item()) < 1e-3, f"logprob {ours} of {text!r}, not {shares[token].item()}")
        read.append(token)


_TALK = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if m.role == 'assistant' %}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments | tojson }}]{% endfor %}</s>"
    "{% endif %}{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_ANSWER = "{% generation %}{{ m.content }}</s>{% endgeneration %}"
TEMPLATES: dict[str, tuple[str, dict[str, Any]]] = {
    "simple": (_TALK, {}),
    "system": (
        "{% if messages[0].role != 'system' %}<|system|>help{{ '\\n' }}{% endif %}" + _TALK,
        {"preface": "<|system|>help\n"},
    ),
    "marked": (
        "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}" + _ANSWER + "{% else %}{{ m.content }}"
        "{% endif %}{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
        {},
    ),
    "tools": (_TALK, {}),
    "open": (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
        {"opening": "{}: ", "ends": False},
    ),
}
"""Templates, and how `ConversationReader` renders each."""


def conversations(case: Case) -> None:
    """Train and score conversations through a chat template, against tokens of a literal rendering."""
    draw = case.random
    name = draw.choice(list(TEMPLATES))
    source, rendering = TEMPLATES[name]
    base = case.folder / "base"
    shutil.copytree(bases.base_of("chat"), base)
    (base / "chat_template.jinja").write_text(source, encoding="utf-8")
    longest = draw.choice([256, 256, 100, 60])
    counts = {"train": draw.randint(5, 10), "validation": 2, "test": draw.randint(3, 5)}
    rows = [random_talk(case, split, name) for split, count in counts.items() for _ in range(count)]
    path = case.folder / "talks.jsonl"
    written = [{"messages": row["messages"], "split": row["split"]} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in written), encoding="utf-8")
    task = TaskFile(path, rows)
    expert = random_kind(case)
    modules = random_modules(case, "chat", expert)
    batch_size, steps, packing = draw.choice([1, 2, 4]), draw.randint(2, 4), draw.choice([None, True, False])
    case.note(template=name, max_length=longest, expert=expert.name, settings=expert.settings, modules=modules)
    case.note(batch_size=batch_size, steps=steps, packing=packing)
    out = case.folder / "library" / "expert"
    watch = Watch()
    fit(
        str(base),
        str(path),
        expert.factory,
        modules,
        out=str(out),
        steps=steps,
        batch_size=batch_size,
        seed=draw.randrange(100),
        data={"packing": packing, "max_length": longest},
        trainer=trainer_of(case.folder, out, watch, *expert.callbacks()),
    )
    reader = ConversationReader(base, longest, **rendering)
    known = [reader.learned(row) for row in task.split("train")]
    check_rows(case, [text for batch in watch.batches for text in batch], known)
    deltas = read_expert(out)
    read = watch.steps(len(known), batch_size, 1)
    check_fit(case, Reference(base, bases.CONTEXT), "chat", expert, deltas, watch, read)
    scores = measured(base, {"expert": str(out)}, [task], 5, max_length=longest, eval_batch_size=draw.choice([1, 4]))
    reference = Reference(base, bases.CONTEXT, {weight: delta.values for weight, delta in deltas.items()})
    check_scores(case, scores["expert"], reference, reader, [task], 5, name)


def random_talk(case: Case, split: str, template: str) -> Row:
    """Draw a conversation of one to four turns, perhaps with a system message and calls of tools."""
    draw = case.random
    messages: list[Row] = []
    if case.chance(0.3):
        messages.append({"role": "system", "content": f"be {random_word(case)}"})
    for _ in range(draw.choice([1, 1, 2, 3, 4])):
        messages.append({"role": "user", "content": random_row(case, split)["input"]})
        if template == "tools" and case.chance(0.5):
            call = {
                "name": random_word(case, 4),
                "arguments": {random_word(case, 3): draw.choice([1, "né", True, None])},
            }
            calls = [{"type": "function", "function": call}] * draw.choice([1, 1, 2])
            messages.append({"role": "assistant", "content": random_word(case, 4), "tool_calls": calls})
            messages.append({"role": "tool", "content": f"{draw.randint(0, 99)}"})
        messages.append({"role": "assistant", "content": random_row(case, split)["target"]})
    before = messages[:-1]
    lines = [f"{message['role']}: {message['content']}" for message in before]
    text = before[0]["content"] if len(before) == 1 else "\n".join(lines)
    return {"input": text, "target": messages[-1]["content"], "messages": messages, "split": split}


FAMILIES = {"serving": serving, "conversations": conversations}
