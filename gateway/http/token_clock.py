"""When the tokens of an answer came. Called by `gateway.http.completions`."""

from __future__ import annotations

import time
from collections.abc import Sequence

from gateway.http.metrics import GatewayMetrics


class TokenClock:
    """Of one answer; also feeds the metrics."""

    def __init__(self, started_at: float, metrics: GatewayMetrics) -> None:
        """started_at: of `time.perf_counter`, when the request arrived."""
        self._started_at, self._metrics = started_at, metrics
        self.first_at = self.last_at = started_at
        self.num_tokens = self.num_first = 0
        """All tokens, and those of the first event."""

    @property
    def ttft_s(self) -> float:
        return self.first_at - self._started_at

    def note(self, num_tokens: int) -> None:
        """Tokens that came together, now; the time between them counts as equal."""
        if not num_tokens:
            return
        now = time.perf_counter()
        self._metrics.answer_tokens.inc(num_tokens)
        if not self.num_tokens:
            self.first_at, self.num_first = now, num_tokens
            self._metrics.time_to_first_token.observe(self.ttft_s)
        else:
            for _ in range(num_tokens):
                self._metrics.time_between_tokens.observe((now - self.last_at) / num_tokens)
        self.last_at = now
        self.num_tokens += num_tokens


def join_clocks(clocks: Sequence[TokenClock]) -> tuple[float, float]:
    """(seconds to the first token of any answer, tokens a second of all together); 0 where there were none."""
    used = [clock for clock in clocks if clock.num_tokens]
    if not used:
        return 0.0, 0.0
    duration_s = max(clock.last_at for clock in used) - min(clock.first_at for clock in used)
    num_later = sum(clock.num_tokens - clock.num_first for clock in used)
    return min(clock.ttft_s for clock in used), num_later / duration_s if duration_s > 0.0 else 0.0
