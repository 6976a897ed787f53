"""The server's metrics in Prometheus' text form."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from dataclasses import asdict, dataclass, field

from memgen.serving.engine import Engine

BOUNDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
"""Upper bounds of the histogram of seconds."""


@dataclass
class Metrics:
    """Counts of requests.

    Attributes:
        requests: by path and status.
        seconds: requests by the first bound that their time does not exceed.
        total_seconds: of all requests together.
    """

    requests: Counter[tuple[str, int]] = field(default_factory=Counter)
    seconds: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS) + 1))
    total_seconds: float = 0.0

    def observe(self, path: str, status: int, seconds: float) -> None:
        """Counts a request."""
        self.requests[path, status] += 1
        self.seconds[bisect_left(BOUNDS, seconds)] += 1
        self.total_seconds += seconds

    def text(self, engine: Engine) -> str:
        """Everything, in Prometheus' text form (version 0.0.4)."""
        lines = ["# TYPE memgen_requests_total counter"]
        lines += [
            f'memgen_requests_total{{path="{path}",status="{status}"}} {count}'
            for (path, status), count in sorted(self.requests.items())
        ]
        lines.append("# TYPE memgen_request_seconds histogram")
        below = 0
        for bound, count in zip((*BOUNDS, "+Inf"), self.seconds, strict=True):
            below += count
            lines.append(f'memgen_request_seconds_bucket{{le="{bound}"}} {below}')
        lines += [
            f"memgen_request_seconds_sum {self.total_seconds:.6f}",
            f"memgen_request_seconds_count {below}",
        ]
        for name, value in asdict(engine.counts).items():
            lines += [f"# TYPE memgen_{name}_total counter", f"memgen_{name}_total {value}"]
        gauges = {"running": engine.running, "waiting": engine.waiting, "rows": engine.rows}
        for name, number in gauges.items():
            lines += [f"# TYPE memgen_{name} gauge", f"memgen_{name} {number}"]
        return "\n".join(lines) + "\n"
