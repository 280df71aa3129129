"""Count requests, tokens and time for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from modular_experts.serving.answers import Answer
from modular_experts.serving.engine import Engine
from modular_experts.serving.models import BASE


class Metrics:
    """The counts of a server, since it started."""

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
