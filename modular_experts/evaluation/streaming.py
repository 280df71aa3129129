"""Answer a prompt, or one after another in a conversation, and hand over the text while it comes."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from modular_experts.base import Base, DType
from modular_experts.base.apply import AnyExpert, open_several
from modular_experts.base.device import device
from modular_experts.base.quantised import Quantise
from modular_experts.data import TaskMixture
from modular_experts.data.chat import (
    Messages,
    PromptReading,
    classifies,
    encoded,
    read_as_each,
    reads_chat,
    template_hash,
)
from modular_experts.evaluation.generation import answer_room, classified, continued
from modular_experts.injection.attach import NamedExperts, attached
from modular_experts.injection.routed import Routed
from modular_experts.injection.task_heads import class_name, task_heads
from modular_experts.language_model import is_classifier
from modular_experts.library import Library, StoredExpert
from modular_experts.library.compatibility import training_in_common, warn_of_missing_parents, warn_unlike_training
from modular_experts.routing.prompts import choose_form, is_rejected, rejection_notice, vectors_for

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answering:
    """How prompts are answered.

    Args:
        system: A system message, which goes before the prompt through the tokenizer's chat template.
        max_new_tokens: The most tokens of an answer, which also ends where the base's context does.
        temperature: Above 0, tokens are sampled, more freely the higher it is.
        seed: Seed of the samples.
        dtype: Data type of the base.
        quantise: Form in which the base is quantised, such as nf4.
    """

    system: str | None = None
    max_new_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0
    dtype: DType = "float32"
    quantise: Quantise | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.temperature < 0:
            tokens = f"max_new_tokens={self.max_new_tokens} must be at least 1"
            raise ValueError(f"{tokens}, and temperature={self.temperature} at least 0")


AS_USUAL = Answering()
"""The likeliest tokens, at most 256."""


def generate(
    base: str | Path | Base | None,
    prompt: str | Messages,
    experts: AnyExpert | Sequence[AnyExpert] = (),
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    chat_template: bool | None = None,
    dtype: DType = "float32",
    write: Callable[[str], object] | None = None,
    data: TaskMixture | None = None,
) -> str:
    """Return the answer of a base with experts to one prompt, without white space at its ends.

    Args:
        base: The base's directory or hub id, or an opened base; None is the one that the experts' records name.
        prompt: The text to answer, or messages of {role, content}, which always go through the chat template.
        experts: One or several, whose deltas are added up: directories of a library, opened experts or task vectors.
        max_new_tokens: The most tokens of the answer, which also ends where the base's context does.
        temperature: 0 takes the likeliest token each time; above 0, tokens are sampled, more freely the higher it is.
        seed: Seed of the samples.
        chat_template: Whether a text goes through the chat template, as a message of the user; None is as the experts
            were trained, by their records; behind a route, as the chosen expert was.
        dtype: Data type of the base.
        write: Takes each piece of the answer as it comes; of a classifier, the class with its probability.
        data: A task of which `data.shots` training rows stand before the prompt as demonstrations. A classifier answers
            with a class of this task; without it, of the only task head or of the expert that a route chooses.

    Raises:
        FileNotFoundError: The base was not found.
        ValueError: An expert was trained on another base, the prompt is empty or too long, or a chat template is
            missing.
    """
    how = Answering(None, max_new_tokens, temperature, seed, dtype)
    opened = open_several(experts, base)
    stored = [expert for expert in opened if isinstance(expert, StoredExpert)]
    warn_of_missing_parents(stored)
    opened_base = Base.open(base, stored)
    tokenizer = opened_base.tokenizer()
    trained_with = training_in_common(stored).get("chat_template") if stored else None
    is_chat = not isinstance(prompt, str) or bool(trained_with if chat_template is None else chat_template)
    template = template_hash(tokenizer) if is_chat else None
    warn_unlike_training(stored, lambda _: {"chat_template": template}, dtype)
    reading = encoded(tokenizer, prompt, is_chat)
    if data is not None and (data.shots or not classifies(tokenizer)):
        reading = _behind_demonstrations(reading, prompt, data, opened_base)
    model = opened_base.load(dtype)
    with attached(model, opened, check=False) as put:
        model.to(device())  # type: ignore[arg-type]
        if isinstance(prompt, str) and chat_template is None and data is None:
            messages = [{"role": "user", "content": prompt}]
            reading = _read_by_route(model, tokenizer, put, prompt, messages) or reading
        if is_classifier(model):
            answer = _class_of(model, reading, put, data, write)
        else:
            answer = _answer(model, tokenizer, reading, how, write)
        model.to("cpu")  # type: ignore[arg-type]
        if isinstance(put, Routed) and put.router is not None and put.current.gates is not None:
            behind = put.members[put.router.experts :]
            fallback = [member.name for member in behind if isinstance(member, StoredExpert)]
            if is_rejected(put.router, put.current.gates).all():
                log.warning("%s", rejection_notice(fallback[0] if fallback else None))
    return answer


def _behind_demonstrations(
    reading: PromptReading, prompt: str | Messages, data: TaskMixture, base: Base
) -> PromptReading:
    """Return a prompt with demonstrations of a task before it, as rows of the task are read."""
    if not isinstance(prompt, str):
        raise ValueError("demonstrations stand before a text, and messages are given; leave the system message out")
    data.chat_template = reading.is_chat
    data.read_for(base)
    return reading._replace(ids=data.prompt_behind_demonstrations(prompt))


def routes_of(library: Library) -> list[str]:
    """Return the names of a library's routes. If there is exactly one, it answers prompts that name no expert."""
    return [expert.name for expert in library.readable(adapters=False) if expert.is_routed]


@torch.no_grad()
def _read_by_route(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, put: object, text: str, messages: Messages
) -> PromptReading | None:
    """Return a prompt as the expert reads it that fits it best, and let only experts of that form answer.

    None where no router of whole prompts is in the model, or its experts are not of a library.
    """
    if not isinstance(put, Routed) or put.router is None or put.prompt_gates is None:
        return None
    members = [expert for expert in put.members if isinstance(expert, StoredExpert)]
    if len(members) < len(put.members):
        return None
    put.prompt_gates.allowed = None
    readings = read_as_each(tokenizer, text, messages, members)
    choosing = readings.members[: put.router.experts]
    if len(readings.by_form) == 1:
        return readings.by_form[readings.base]
    # Without gates, the model is the base alone, which routers read.
    put.current.gates = None
    router = put.router.to(model.device)
    vectors = {
        form: vectors_for(router, model, torch.tensor([readings.by_form[form].ids], device=model.device))
        for form in set(choosing)
    }
    chosen = choose_form(router, vectors, choosing)
    if chosen.is_chat is not None:
        put.prompt_gates.allowed = chosen.allowed
        return readings.by_form[chosen.is_chat]
    fallback = readings.members[put.router.experts :]
    return readings.by_form[fallback[0] if fallback else readings.base]


@torch.no_grad()
def _class_of(
    model: PreTrainedModel,
    reading: PromptReading,
    put: object,
    data: TaskMixture | None,
    write: Callable[[str], object] | None,
) -> str:
    """Return the class that a classifier gives a prompt; `write` also gets its probability."""
    heads = task_heads(model).tasks
    prompt = torch.tensor(reading.ids, device=model.device)
    tasks = list(data.roles) if data else heads
    reason = ""
    if data is None and isinstance(put, Routed) and put.router is not None:
        # The gates of a pass do not depend on the head behind it.
        classified(model, [prompt], heads[:1])
        assert put.current.gates is not None
        best = int(put.current.gates.ids[0, put.current.gates.weights[0].argmax()])
        chosen = put.members[best] if best < put.router.experts else None
        if isinstance(chosen, StoredExpert):
            tasks = [task for task in chosen.record["tasks"] if task in heads]
        else:
            tasks = []
            reason = "no expert takes this prompt: "
    if len(tasks) != 1:
        names = ", ".join(heads)
        raise ValueError(f"{reason}the experts classify {names}; name the prompt's task: `tasks=['{heads[0]}.jsonl']`")
    numbers, shares = classified(model, [prompt], tasks)
    answer = class_name(int(numbers[0]))
    if write:
        write(f"{answer} ({float(shares[0]):.3f})")
    return answer


class Conversation:
    """A conversation with an opened base, in which a library's experts answer by name: `talk.experts.use("dates")`.

    Messages go through the chat template if there is a system message, if the experts in use were trained with it, or
    for the base alone if it has one. Behind a route, the expert that it chooses decides. Otherwise each prompt is read
    alone. `messages` holds all that was said.
    """

    def __init__(self, base: Base, experts: Mapping[str, StoredExpert], how: Answering = AS_USUAL) -> None:
        if is_classifier(base.structure.model):
            raise ValueError(f"{base.place} classifies texts, so there is nothing to talk about; ask it with generate")
        self.model = base.load(how.dtype).to(device())  # type: ignore[arg-type]
        self.tokenizer = base.tokenizer()
        self.library = experts
        self.experts = NamedExperts(self.model, experts)
        self.how = how
        self.messages = [{"role": "system", "content": how.system}] if how.system else []

    @property
    def is_chat(self) -> bool:
        """Whether messages go through the chat template."""
        used = [self.library[name] for name in self.experts.names]
        return bool(self.how.system) or reads_chat(self.tokenizer, used)

    def ask(self, prompt: str, write: Callable[[str], object] | None = None) -> str:
        """Return the answer to a prompt, as `generate`, and remember both, unless the answer was interrupted."""
        messages = [*self.messages, {"role": "user", "content": prompt}]
        routed = None
        if not self.how.system:
            routed = _read_by_route(self.model, self.tokenizer, self.experts.used, prompt, messages)
        reading = routed or encoded(self.tokenizer, messages if self.is_chat else prompt, self.is_chat)
        answer = _answer(self.model, self.tokenizer, reading, self.how, write)
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        return answer


@torch.no_grad()
def _answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    reading: PromptReading,
    how: Answering,
    write: Callable[[str], object] | None,
) -> str:
    stops = reading.ends
    room = answer_room(model, len(reading.ids), how.max_new_tokens)
    pad = next(iter(stops), 0) if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    sampling: dict[str, object] = {}
    if how.temperature:
        sampling = {"do_sample": True, "temperature": how.temperature, "top_k": 0}
    config = GenerationConfig(max_new_tokens=room, eos_token_id=stops or None, pad_token_id=pad, **sampling)
    ids = torch.tensor([reading.ids], device=model.device)
    streamer = _Streamer(tokenizer, write) if write else None
    with torch.random.fork_rng():
        torch.manual_seed(how.seed)
        written = continued(model, ids, torch.ones_like(ids), config, streamer)[0]
    if len(written) == room < how.max_new_tokens and int(written[-1]) not in stops:
        log.warning("the answer ended where the model's context does; shorten the prompt")
    return str(tokenizer.decode(written, skip_special_tokens=True, clean_up_tokenization_spaces=False)).strip()


class _Streamer(TextStreamer):
    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], object]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        self.write = write
        self.begun = False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        text = text if self.begun else text.lstrip()
        self.begun = self.begun or bool(text)
        if text:
            self.write(text)
