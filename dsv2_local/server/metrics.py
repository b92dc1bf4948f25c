"""The server's figures for Prometheus; names and meanings follow vLLM's where it has the same figure."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from dsv2_local.server.service import Job, Service

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_TOKEN_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)


class Metrics:
    """A registry of its own, so that several servers may run in a process."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, service: Service) -> None:
        self._registry = CollectorRegistry()
        self._first = Histogram(
            "dsv2_time_to_first_token_seconds", "From the request to its first token, waiting included.",
            buckets=_SECONDS, registry=self._registry,
        )  # fmt: skip
        self._token = Histogram(
            "dsv2_time_per_output_token_seconds", "Mean time between the tokens of an answer.",
            buckets=_TOKEN_SECONDS, registry=self._registry,
        )  # fmt: skip
        self._registry.register(_Figures(service))
        service.finished.append(self._observe)

    def text(self) -> bytes:
        """All figures."""
        return generate_latest(self._registry)

    def _observe(self, job: Job) -> None:
        stats = job.generation.stats
        if job.first is not None:
            self._first.observe(job.first - job.submitted)
        if stats.completion_tokens > 1:
            self._token.observe(stats.decode_seconds / (stats.completion_tokens - 1))


class _Figures(Collector):
    """What the service and the engine know, read when it is asked for."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def describe(self) -> Iterator[Metric]:
        return iter(())  # else the registry would read the engine at once

    def collect(self) -> Iterator[Metric]:
        service, totals = self._service, self._service.totals
        yield _counter("dsv2_requests", "Requests, whatever they asked.", totals.requests)
        ended = CounterMetricFamily("dsv2_answers", "Answers that have ended, by how.", labels=["end"])
        for end in ("answers", "cancelled", "failed"):
            ended.add_metric(["complete" if end == "answers" else end], getattr(totals, end))
        yield ended
        yield _counter("dsv2_prompt_tokens", "Tokens of prompts.", totals.prompt_tokens)
        yield _counter("dsv2_reused_tokens", "Of these, found in the prefix cache.", totals.reused_tokens)
        yield _counter("dsv2_completion_tokens", "Generated tokens.", totals.completion_tokens)
        yield _gauge("dsv2_requests_active", "Requests that are being answered.", service.active)
        yield _gauge("dsv2_model_loaded", "Whether the model is loaded.", float(service.loaded is not None))
        if llm := service.loaded:
            scheduler, pool = llm.engine.scheduler, llm.engine.cache.pool
            running = len(scheduler.running)
            yield _gauge("dsv2_answers_running", "Answers that are being computed.", running)
            yield _gauge("dsv2_answers_waiting", "Answers that wait.", scheduler.waiting)
            used = 1 - pool.available / pool.count
            yield _gauge("dsv2_kv_cache_usage", "Part of the KV cache that running answers hold.", used)
            stored = llm.engine.stored
            kept = GaugeMetricFamily("dsv2_stored_bytes", "Of blocks that are set aside.", labels=["place"])
            kept.add_metric(["ram"], stored.ram_bytes)
            kept.add_metric(["disk"], stored.disk_bytes)
            yield kept
            yield _counter("dsv2_restored_blocks", "Blocks that were brought back.", stored.restored_blocks)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(name, text, value=value)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)
