"""What a server has done, counted: for `/metrics`, in Prometheus's words, and for the page.

Counting is a few additions of our own; prometheus_client writes the text, and is imported when somebody asks for it.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, final

if TYPE_CHECKING:
    from .parts import Usage
    from .registry import Registry

# Upper bounds, in seconds.
REQUEST_BOUNDS = (0.01, 0.05, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
FIRST_TOKEN_BOUNDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
# What is counted of paths: those that exist, by their beginnings, so that nobody can make a series for each request.
_PATHS = (
    "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/models", "/health", "/metrics",
)  # fmt: skip
_METHODS = ("GET", "POST", "DELETE", "HEAD", "OPTIONS")


@final
class Histogram:
    """Values sorted into buckets."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def buckets(self) -> list[tuple[str, float]]:
        """As Prometheus has them: each counts all below."""
        found, total = [], 0
        for bound, count in zip([*map(str, self.bounds), "+Inf"], self.counts, strict=True):
            total += count
            found.append((bound, float(total)))
        return found


@final
class Metrics:
    """Counters since the server's start. Everything is called from the event loop's thread."""

    def __init__(self) -> None:
        self.began = time.time()
        self._requests: Counter[tuple[str, str, str]] = Counter()
        self._tokens: Counter[tuple[str, str]] = Counter()
        self._durations: dict[str, Histogram] = {}
        self._first_tokens: dict[str, Histogram] = {}

    def request_done(self, method: str, path: str, status: int, seconds: float) -> None:
        """A request has been answered. status: 0 where the client had gone before."""
        kind = path_kind(path)
        self._requests[(method if method in _METHODS else "other", kind, str(status or "client gone"))] += 1
        self._durations.setdefault(kind, Histogram(REQUEST_BOUNDS)).add(seconds)

    def answered(self, model: str, usage: Usage, first_token: float | None = None) -> None:
        """Answers to one request. first_token: seconds until there was one."""
        tokens = self._tokens
        tokens[model, "prompt"] += usage.prompt_tokens
        tokens[model, "cached"] += usage.cached_tokens
        tokens[model, "completion"] += usage.completion_tokens
        tokens[model, "reasoning"] += usage.reasoning_tokens
        if first_token is not None:
            self._first_tokens.setdefault(model, Histogram(FIRST_TOKEN_BOUNDS)).add(first_token)

    def text(self, registry: Registry) -> tuple[bytes, str]:
        """All of it, and its content type."""
        from prometheus_client import CollectorRegistry, generate_latest
        from prometheus_client.exposition import CONTENT_TYPE_LATEST

        found = CollectorRegistry()
        found.register(_Collector(self, registry))
        return generate_latest(found), CONTENT_TYPE_LATEST

    def families(self, registry: Registry) -> Iterator[Any]:
        """As prometheus_client has them."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        requests = CounterMetricFamily(
            "openelm_mlx_requests", "Requests by method, path and status", labels=("method", "path", "status")
        )
        for labels, count in sorted(self._requests.items()):
            requests.add_metric(labels, count)
        yield requests
        tokens = CounterMetricFamily(
            "openelm_mlx_tokens",
            "Tokens of finished answers; cached ones are a part of the prompt's",
            labels=("model", "kind"),
        )
        for pair, count in sorted(self._tokens.items()):
            tokens.add_metric(pair, count)
        yield tokens
        for name, what, label, kept in (
            ("openelm_mlx_request_seconds", "Time of a request", "path", self._durations),
            ("openelm_mlx_first_token_seconds", "Time to an answer's first token", "model", self._first_tokens),
        ):
            family = HistogramMetricFamily(name, what, labels=(label,))
            for key, histogram in sorted(kept.items()):
                family.add_metric((key,), histogram.buckets(), histogram.sum)
            yield family
        status = registry.status()
        running = GaugeMetricFamily(
            "openelm_mlx_requests_running", "Requests that are being computed", labels=("model",)
        )
        waiting = GaugeMetricFamily("openelm_mlx_requests_waiting", "Requests in the queue", labels=("model",))
        loaded = GaugeMetricFamily("openelm_mlx_model_loaded", "1 for a model in memory", labels=("model",))
        kept_bytes = GaugeMetricFamily(
            "openelm_mlx_kept_prefix_bytes", "Keys and values kept for prompts that begin alike", labels=("model",)
        )
        for each in status["models"]:
            model = (each["id"],)
            loaded.add_metric(model, float(each["state"] == "ready"))
            running.add_metric(model, each.get("running", 0))
            waiting.add_metric(model, each.get("waiting", 0))
            kept_bytes.add_metric(model, each.get("kept_bytes", 0))
        yield from (running, waiting, loaded, kept_bytes)
        memory = GaugeMetricFamily("openelm_mlx_memory_bytes", "MLX's memory", labels=("kind",))
        for kind, value in status["memory"].items():
            memory.add_metric((kind.removesuffix("_bytes"),), value)
        yield memory
        yield GaugeMetricFamily("openelm_mlx_start_time_seconds", "When the server began, since 1970", value=self.began)


@final
class _Collector:
    def __init__(self, metrics: Metrics, registry: Registry) -> None:
        self._metrics, self._registry = metrics, registry

    def collect(self) -> Iterator[Any]:
        return self._metrics.families(self._registry)


def path_kind(path: str) -> str:
    """A path as it is counted."""
    if path == "/":
        return "/"
    return next((each for each in _PATHS if path == each or path.startswith(each + "/")), "other")
