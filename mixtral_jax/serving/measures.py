"""What Prometheus may ask of the server."""

from collections.abc import Iterator

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from mixtral_jax.serving.engine import Engine, Job

PATHS = ("/", "/health", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions")  # others count together


class Measures:
    """Counts of one server."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, engine: Engine):
        """Begins to count.

        Args:
            engine: that is asked for its state whenever somebody looks.
        """
        self._engine = engine
        self._registry = CollectorRegistry()
        self._answers = Counter(
            "mixtral_jax_requests", "Answers by path and status", ["path", "status"], registry=self._registry
        )
        seconds = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
        self._first = Histogram(
            "mixtral_jax_first_token_seconds", "From a request to its first token", buckets=seconds,
            registry=self._registry)  # fmt: skip
        self._whole = Histogram(
            "mixtral_jax_text_seconds", "From a request to the end of a text", buckets=seconds,
            registry=self._registry)  # fmt: skip
        self._registry.register(self)
        engine.ended = self._ended

    def answered(self, path: str, status: int) -> None:
        """Counts an answer."""
        self._answers.labels(path if path in PATHS else "other", str(status)).inc()

    def text(self) -> bytes:
        """Writes all in Prometheus' format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Looks at the engine."""
        engine = self._engine
        for name, help_, value in (
            ("running", "Texts that are being written", engine.running),
            ("waiting", "Texts that wait for a row of the batch", engine.waiting),
            ("rows", "Texts that can be written at once", engine.batch.rows),
        ):
            yield GaugeMetricFamily(f"mixtral_jax_{name}", help_, value)
        for name, help_, value in (
            ("prompt_tokens", "Tokens of prompts", engine.prompt_tokens),
            ("drawn_tokens", "Tokens of texts", engine.drawn_tokens),
        ):
            yield CounterMetricFamily(f"mixtral_jax_{name}", help_, value)

    def _ended(self, job: Job) -> None:
        self._first.observe(job.first_token - job.submitted)
        self._whole.observe(job.latest - job.submitted)
