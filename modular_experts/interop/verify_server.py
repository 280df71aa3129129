"""Prove that a running server answers with an expert: compare its log-probabilities with those computed here.

Adapters load and change nothing where names do not fit, and a server may answer with another expert or on another base.
Its text does not show that; the log-probabilities of its own tokens do.
"""

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modular_experts.base import Base, DType
from modular_experts.base.device import device
from modular_experts.data import TaskMixture
from modular_experts.data.batch import Collator, Example, Tokens, fitted
from modular_experts.data.inputs import Inputs
from modular_experts.data.rows import spread_evenly
from modular_experts.evaluation import answer_logits
from modular_experts.injection import context_length
from modular_experts.injection.attach import attached
from modular_experts.library import StoredExpert
from modular_experts.progress import Counted, Progress
from modular_experts.routing.prompts import evaluation_mode

if TYPE_CHECKING:
    from httpx import Client

Finding = Literal["acts", "base", "other", "unclear", "differs", "other base", "absent"]
BATCH = 16
LEAST = 0.002
"""Differences of a log-probability, in nats, that never count."""


@dataclass(frozen=True)
class Verdict:
    """The model that gives a server's answers where a request names an expert.

    Attributes:
        expert: Name of the expert.
        finding: `acts`; `base`, the base alone; `other`, another expert; `unclear`, because the expert has the
            log-probabilities of the base or of another expert; `differs` from all that was computed; `other base`, as
            the server's base has not the log-probabilities of the experts' base; `absent`, not served.
        nearest: The expert, `base` or the other expert that fits best; empty if it is absent.
        distances: For `base` and each expert the mean difference of a log-probability, in nats.
        share: How far the server's log-probabilities are from the base's towards the expert's: 0 is the base, 1 the
            expert.
        prompts: How many prompts were asked, of which `fitting` fit the expert.
    """

    expert: str
    finding: Finding
    nearest: str = ""
    distances: Mapping[str, float] | None = None
    share: float = 0.0
    prompts: int = 0
    fitting: int = 0

    def __str__(self) -> str:
        if self.finding == "absent":
            return f"{self.expert} is not served"
        assert self.distances is not None
        own = f"{self.distances[self.expert]:.3f} nats from the expert, {self.distances['base']:.3f} from the base"
        return f"{self.expert} {self._sentence()} ({own}; {self.prompts} prompts)"

    def _sentence(self) -> str:
        if self.finding == "acts":
            return "acts"
        if self.finding == "base":
            return "is the base: the server loaded it and changes nothing"
        if self.finding == "other":
            return f"is another expert: {self.nearest}"
        if self.finding == "other base":
            return "runs on another base than its own"
        if self.finding == "unclear":
            return f"cannot be told from {self.nearest} by these prompts; give its own --tasks"
        if self.fitting:
            return f"acts on {self.fitting} of {self.prompts} prompts alone; on the others {self.nearest} is nearest"
        if self.share < 0.05:
            return "is nothing of this library"
        return f"is nothing of this library: it goes {self.share:.0%} of the way from the base to the expert"


@dataclass(frozen=True)
class _Answer:
    """A server's answer to a prompt: its tokens, and their log-probabilities `(tokens,)` float64, NaN if not told."""

    prompt: Tensor
    tokens: list[int]
    logprobs: Tensor

    @property
    def example(self) -> Example:
        ids = torch.cat([self.prompt.long(), torch.tensor(self.tokens)])
        return Example("", "", "", Tokens(ids, len(self.prompt)))


class _Server:
    """The models of a server that speaks OpenAI's protocol."""

    def __init__(self, client: "Client", tokenizer: PreTrainedTokenizerBase) -> None:
        self._client = client
        self._tokenizer = tokenizer
        self.models = {entry["id"]: entry for entry in self._asked("GET", "models", None)["data"]}

    def id_of(self, expert: str) -> str | None:
        """Return how requests name an expert; SGLang has `BASE:expert`."""
        if expert in self.models:
            return expert
        return next((id for id in self.models if id.endswith(f":{expert}")), None)

    def base(self, experts: Sequence[str], place: str) -> str | None:
        """Return how requests name the base, if that is known."""
        others = [id for id in self.models if not any(self.id_of(expert) == id for expert in experts)]
        likely = [id for id in others if id in ("base", place) or place.rstrip("/").endswith(f"/{id}")]
        parents = [entry["parent"] for entry in self.models.values() if entry.get("parent") in others]
        return next(iter([*likely, *parents]), None)

    def answer(self, model: str, prompt: Tensor, most: int) -> _Answer:
        body = {"model": model, "prompt": prompt.tolist(), "max_tokens": most, "temperature": 0, "logprobs": 1}
        told = self._asked("POST", "completions", body | {"return_tokens_as_token_ids": True})
        try:
            named = told["choices"][0]["logprobs"]["tokens"]
            logprobs = torch.tensor(told["choices"][0]["logprobs"]["token_logprobs"], dtype=torch.float64)
            tokens = [self._id(token) for token in named]
        except (KeyError, IndexError, TypeError, ValueError):
            raise ValueError(f"the server gives no log-probabilities for {model}; start it so that it does") from None
        if not tokens:
            # The server ended the answer at once, and does not tell with which probability.
            return _Answer(prompt, [self._tokenizer.eos_token_id], torch.full((1,), torch.nan, dtype=torch.float64))
        # Nothing is known behind a token that has no id here.
        known = list(itertools.takewhile(lambda id: id is not None, tokens))
        return _Answer(prompt, cast(list[int], known), logprobs[: len(known)])

    def _id(self, token: str) -> int | None:
        """Return the id of a token; None if the tokenizer has no such token, or several of its text."""
        if token.startswith("token_id:"):
            id = int(token.removeprefix("token_id:"))
            return id if 0 <= id < len(self._tokenizer) else None
        ids = self._ids.get(token, [])
        return ids[0] if len(ids) == 1 else None

    @cached_property
    def _ids(self) -> dict[str, list[int]]:
        ids: dict[str, list[int]] = {}
        for id in range(len(self._tokenizer)):
            # Alone, many tokenizers leave out a token's space.
            text = str(self._tokenizer.decode([id, id]))[len(str(self._tokenizer.decode([id]))) :]
            ids.setdefault(text, []).append(id)
        return ids

    def _asked(self, verb: str, path: str, body: Mapping[str, object] | None) -> Any:
        import httpx

        try:
            answer = self._client.request(verb, path, json=body)
            answer.raise_for_status()
            return answer.json()
        except httpx.HTTPStatusError as error:
            text = f"{error.response.status_code} to {verb} {path}: {error.response.text[:200]}"
            raise ValueError(f"the server answered {text}") from None
        except (httpx.HTTPError, ValueError) as error:
            place = f"{self._client.base_url}{path}"
            raise ValueError(f"no server of OpenAI's protocol answers at {place} ({error}); give its address") from None


def verify_server(
    url: str,
    experts: Sequence[StoredExpert],
    others: Sequence[StoredExpert] = (),
    data: TaskMixture | None = None,
    base: str | Base | None = None,
    prompts: int = 8,
    tokens: int = 16,
    tolerance: float = 0.1,
    dtype: DType = "float32",
    client: "Client | None" = None,
    progress: Progress = iter,
) -> list[Verdict]:
    """Ask a server for answers of experts, and find out for each which model gives them.

    The server answers an expert's prompts greedily, once by the name of the expert and once by the base's. The base,
    the expert and every other expert then compute here the log-probabilities of the same tokens.

    Args:
        url: Address of the server, such as `http://localhost:8000`.
        experts: The experts that the server should have.
        others: Further experts that it may answer with instead.
        data: Rows of the experts' tasks, if the experts keep no inputs.
        base: The base's directory or hub id; the one in the experts' records by default.
        prompts: The most prompts for an expert.
        tokens: The most tokens of an answer.
        tolerance: Largest mean difference of the log-probabilities of a prompt's tokens that counts as the same, in
            nats. If the server also answers as the base, ten times its median difference there is the limit, for
            rounding. One prompt of eight may be up to three times as far, where two tokens are as likely.
        dtype: Data type of the base here.
        client: An `httpx.Client` with the server's address, for headers of your own; by default the key in
            `MODULAR_EXPERTS_API_KEY` is sent, if there is one.
        progress: Wraps the models that are computed here.

    Raises:
        ImportError: httpx is not installed.
        ValueError: No server answers, or it gives no log-probabilities; an expert has no inputs, or is called `base`.
    """
    everyone = [*experts, *others]
    if "base" in [expert.name for expert in everyone]:
        raise ValueError("an expert is called base, as servers call the base; give it another name")
    opened = Base.open(base, everyone)
    tokenizer = opened.tokenizer()
    longest = context_length(opened.structure.model)
    asked: dict[str, list[_Answer]] = {}
    of_base: list[_Answer] = []
    with ExitStack() as stack:
        server = _Server(client or stack.enter_context(_client(url)), tokenizer)
        base_id = server.base([expert.name for expert in everyone], opened.place)
        for expert in experts:
            id = server.id_of(expert.name)
            if id is None:
                continue
            answers = asked[expert.name] = []
            for prompt in _prompts_of(expert, data, opened, prompts):
                kept = prompt if longest is None else fitted(prompt, tokens, longest)
                # The base comes first: a cache of prefixes that forgets the expert gives the base's keys and values.
                if base_id:
                    of_base.append(server.answer(base_id, kept, tokens))
                answers.append(server.answer(id, kept, tokens))
    model = opened.load(dtype).to(device())  # type: ignore[arg-type]
    expected: dict[str, dict[str, list[Tensor]]] = {name: {} for name in asked}
    rounding = LEAST / 10
    limit = tolerance
    for candidate in progress(Counted([None, *everyone], "models")):
        with attached(model, [candidate] if candidate else []):
            for name, answers in asked.items():
                expected[name][candidate.name if candidate else "base"] = _logprobs(model, tokenizer, answers)
            if candidate is None and (gaps := _gaps(of_base, _logprobs(model, tokenizer, of_base))):
                rounding = median(gaps)
                limit = min(tolerance, max(LEAST, 10 * rounding))
    verdicts: list[Verdict] = []
    for expert in experts:
        if answers := asked.get(expert.name, []):
            verdicts.append(_verdict(expert.name, answers, expected[expert.name], limit, rounding > tolerance))
        else:
            verdicts.append(Verdict(expert.name, "absent"))
    return verdicts


def _client(url: str) -> "Client":
    try:
        import httpx
    except ImportError as error:
        raise ImportError("a server is asked with httpx: pip install 'modular-experts[serve]'") from error
    key = os.environ.get("MODULAR_EXPERTS_API_KEY")
    return httpx.Client(
        base_url=f"{url.rstrip('/').removesuffix('/v1')}/v1/",
        headers={"Authorization": f"Bearer {key}"} if key else {},
        timeout=120,
    )


def _prompts_of(expert: StoredExpert, data: TaskMixture | None, base: Base, most: int) -> list[Tensor]:
    source = data or Inputs.kept_by([expert])
    source.read_for(base)
    by_task = source.input_examples(["test"])
    # Without rows of the expert's own tasks, any rows tell experts apart, if they move enough there.
    own = [task for task in by_task if task in expert.record["tasks"]]
    rows = [example for task in own or by_task for example in by_task[task]]
    if not rows:
        raise ValueError(f"there are no test rows to ask {expert.name}; give tasks that have some")
    return [row.tokens.ids[: row.tokens.prompt] for row in spread_evenly(rows, most)]


@torch.no_grad()
def _logprobs(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, answers: Sequence[_Answer]) -> list[Tensor]:
    """Return for each answer `(tokens, 2)` float64: the tokens' log-probabilities, and how far they are below the
    likeliest tokens'.
    """
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    found: list[Tensor] = []
    with evaluation_mode(model):
        for part in _batches(answers):
            batch = Collator(pad, texts=False)([answer.example for answer in part])
            moved = {name: of.to(model.device) if isinstance(of, Tensor) else of for name, of in batch.items()}
            logits, labels = answer_logits(model, moved)
            logprobs = logits.float().log_softmax(-1)
            chosen = logprobs.gather(1, labels[:, None])[:, 0]
            pairs = torch.stack([chosen, logprobs.amax(1) - chosen], 1).double().cpu()
            found += pairs.split([len(answer.tokens) for answer in part])
    return found


def _batches(answers: Sequence[_Answer]) -> Iterator[Sequence[_Answer]]:
    for first in range(0, len(answers), BATCH):
        yield answers[first : first + BATCH]


def _gaps(answers: Sequence[_Answer], expected: Sequence[Tensor]) -> list[float]:
    """Return the mean difference of a log-probability for each prompt."""
    gaps: list[float] = []
    for answer, own in zip(answers, expected, strict=True):
        # A greedy answer takes the likeliest token, also where its log-probability is not told.
        apart = torch.where(answer.logprobs.isnan(), own[:, 1], (answer.logprobs - own[:, 0]).abs())
        if len(apart):
            gaps.append(float(apart.mean()))
    return gaps


def _fit(gaps: Sequence[float], limit: float) -> bool:
    beyond = sum(gap > limit for gap in gaps)
    return bool(gaps) and beyond <= len(gaps) // 8 and max(gaps) <= 3 * limit


def _verdict(
    name: str, answers: Sequence[_Answer], expected: Mapping[str, Sequence[Tensor]], limit: float, is_other_base: bool
) -> Verdict:
    gaps = {candidate: _gaps(answers, own) for candidate, own in expected.items()}
    distances = {candidate: sum(own) / max(1, len(own)) for candidate, own in gaps.items()}
    served = torch.cat([answer.logprobs for answer in answers])
    base = torch.cat(list(expected["base"]))[:, 0]
    way = torch.cat(list(expected[name]))[:, 0] - base
    told = ~served.isnan()
    share = float((served - base)[told] @ way[told] / (way[told] @ way[told]).clamp(min=1e-12))
    fitting = [candidate for candidate, own in gaps.items() if _fit(own, limit)]
    nearest = min(fitting or distances, key=lambda candidate: (distances[candidate], candidate != name))
    # The distances cannot tell two candidates apart if one is not twice as far as the other.
    rivals = [candidate for candidate in fitting if distances[candidate] <= 2 * distances[nearest] + 1e-4]
    finding: Finding
    if not gaps[name]:
        # No token of the answers has a known id.
        finding = "unclear"
        nearest = "base"
    elif is_other_base:
        finding = "other base"
    elif name in rivals and len(rivals) > 1:
        finding = "unclear"
        nearest = next(candidate for candidate in rivals if candidate != name)
    elif fitting:
        finding = "acts" if nearest == name else "base" if nearest == "base" else "other"
    else:
        finding = "differs"
        wrong = [number for number, gap in enumerate(gaps[name]) if gap > limit]
        nearest = min(distances, key=lambda candidate: sum(gaps[candidate][number] for number in wrong))
    count = sum(gap <= limit for gap in gaps[name])
    return Verdict(name, finding, nearest, distances, share, len(gaps[name]), count)
