"""Counters, gauges and a histogram of the server, in Prometheus' text format."""

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from magistral_mlx.talk.reply import Reply

if TYPE_CHECKING:
    from magistral_mlx.decoder.prefixes import Prefixes

    from .slots import Slots

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Uses its own registry, so that several servers can run in one process."""

    def __init__(self, slots: "Slots", prefixes: "Prefixes") -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "magistral_requests", "Responses by path and status", ["path", "status"], registry=registry
        )
        self._replies = Counter(
            "magistral_replies", "Replies by finish reason", ["reason"], registry=registry
        )
        self._tokens = Counter("magistral_tokens", "Tokens by kind", ["kind"], registry=registry)
        self._first = Histogram(
            "magistral_first_token_seconds",
            "From a reply's start to its first token",
            buckets=_SECONDS,
            registry=registry,
        )
        for name, text, read in (
            ("running", "Requests running now", lambda: slots.running),
            ("waiting", "Requests in the queue", lambda: slots.waiting),
            ("prefix_cache_bytes", "KV cache kept of earlier prompts", lambda: prefixes.nbytes),
        ):
            Gauge(f"magistral_{name}", text, registry=registry).set_function(read)

    def answered(self, path: str, status: int) -> None:
        self._requests.labels(path, str(status)).inc()

    def replied(self, reply: Reply) -> None:
        stats = reply.stats
        self._replies.labels(reply.finish_reason).inc()
        self._tokens.labels("prompt_read").inc(stats.prompt_tokens - stats.cached_tokens)
        self._tokens.labels("prompt_cached").inc(stats.cached_tokens)
        self._tokens.labels("thinking").inc(stats.thinking_tokens)
        self._tokens.labels("answer").inc(stats.answer_tokens)
        if stats.first_token_seconds:
            self._first.observe(stats.first_token_seconds)

    def text(self) -> bytes:
        return generate_latest(self._registry)
