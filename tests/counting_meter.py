"""A meter that counts instead of timing, and a shape small enough for seconds."""

from __future__ import annotations

from memgen.bench.shapes import Shape
from memgen.bench.timing import Meter, Sample

TINY = Shape(hidden=32, layers=2, heads=4, kv_heads=2, feed_forward=48, vocabulary=260)


class CountingMeter(Meter):
    """Runs the work and gives the next of the times it was told, or 1 second."""

    cuda = False

    def __init__(self, seconds=()):
        self.seconds = list(seconds)
        self.runs = 0

    def measure(self, work):
        work()
        value = self.seconds[self.runs] if self.runs < len(self.seconds) else 1.0
        self.runs += 1
        return Sample(wall=value, cpu=value / 2, peak_bytes=100 + self.runs)
