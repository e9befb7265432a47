"""The gateway's own Prometheus metrics, and their text together with the router's."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

PREFIX = "sage_moe_"
FIRST_TOKEN_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
BETWEEN_TOKENS_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class GatewayMetrics:
    """Metrics of one HTTP app, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            PREFIX + "http_requests", "HTTP requests answered.", ["route", "status"], registry=registry
        )
        self.in_flight = Gauge(PREFIX + "http_requests_in_flight", "HTTP requests open.", registry=registry)
        self.prompt_tokens = Counter(
            PREFIX + "prompt_tokens", "Prompt tokens of checked requests.", registry=registry
        )
        self.answer_tokens = Counter(PREFIX + "completion_tokens", "Tokens answered.", registry=registry)
        self.time_to_first_token = Histogram(
            PREFIX + "time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            buckets=FIRST_TOKEN_BUCKETS_S,
            registry=registry,
        )
        self.time_to_first_sound = Histogram(
            PREFIX + "time_to_first_sound_seconds",
            "From a request's arrival to the first samples of an answer that is spoken.",
            buckets=FIRST_TOKEN_BUCKETS_S,
            registry=registry,
        )
        self.time_between_tokens = Histogram(
            PREFIX + "time_between_tokens_seconds",
            "Between an answer's tokens.",
            buckets=BETWEEN_TOKENS_BUCKETS_S,
            registry=registry,
        )

    def render(self, router_text: str) -> str:
        """Prometheus text of the gateway followed by the router's families, without those that the gateway has:
        a family may occur only once."""
        own = generate_latest(self._registry).decode()
        return own + "".join(_families_without(router_text, _family_names(own)))


def _family_names(text: str) -> set[str]:
    return {line.split(" ", 3)[2] for line in text.splitlines() if line.startswith("# TYPE ")}


def _families_without(text: str, names: set[str]) -> list[str]:
    """Lines of all families but the named ones. A family begins with its HELP or TYPE line."""
    kept, is_kept = [], True
    for line in text.splitlines():
        if line.startswith(("# HELP ", "# TYPE ")):
            is_kept = line.split(" ", 3)[2] not in names
        if is_kept and line:
            kept.append(line + "\n")
    return kept
