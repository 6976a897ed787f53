"""Random ragged insertion plans."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

VOCABULARY = 13


@dataclass(frozen=True)
class Plan:
    """Arguments of `weave_rows` beside the values."""

    tokens: torch.Tensor
    lengths: torch.Tensor
    points: torch.Tensor
    sizes: torch.Tensor
    firsts: torch.Tensor
    latents: int
    width: int

    def by_hand(self, table, latents):
        """Each row as a list of (source or None, embedding)."""
        rows = []
        for row, length in enumerate(self.lengths.tolist()):
            line = []
            plan = list(
                zip(
                    self.points[row].tolist(),
                    self.sizes[row].tolist(),
                    self.firsts[row].tolist(),
                    strict=True,
                )
            )
            for index in range(length + 1):
                for point, size, first in plan:
                    if point == index:
                        line += [(m, latents[m].to(table.dtype)) for m in range(first, first + size)]
                if index < length:
                    line.append((None, table[self.tokens[row, index]]))
            rows.append(line)
        return rows

    def to(self, *, index=torch.int64, device="cpu", strided=False):
        """The same plan in another integer type, elsewhere, or as views with gaps."""
        moved = {}
        for name in ("tokens", "lengths", "points", "sizes", "firsts"):
            tensor = getattr(self, name).to(device=device, dtype=index)
            if strided:
                tensor = torch.stack([tensor, torch.full_like(tensor, 77)], dim=-1)[..., 0]
            moved[name] = tensor
        return Plan(**moved, latents=self.latents, width=self.width)


@st.composite
def plans(draw, rows=4, length=6):
    """Rows of different length with any number of points, of different size and 0 too, some of which share latents."""
    count = draw(st.integers(0, rows))
    lengths = draw(st.lists(st.integers(0, length), min_size=count, max_size=count))
    latents = draw(st.integers(0, 7))
    kept = []
    for own in lengths:
        points = sorted(draw(st.sets(st.integers(0, own), max_size=4)))
        blocks = []
        for point in points:
            size = draw(st.integers(0, min(latents, 3)))
            blocks.append((point, size, draw(st.integers(0, latents - size))))
        kept.append(blocks)
    most = max((len(blocks) for blocks in kept), default=0) + draw(st.integers(0, 1))
    # What stands behind a row's last point means nothing.
    filled = [blocks + [(-1, 9, 99)] * (most - len(blocks)) for blocks in kept]
    columns = torch.tensor(filled, dtype=torch.int64).view(count, most, 3)
    longest = max(lengths, default=0)
    ends = [own + sum(size for _, size, _ in blocks) for own, blocks in zip(lengths, kept, strict=True)]
    tokens = torch.arange(count * longest).view(count, longest) * 5 % VOCABULARY
    return Plan(
        tokens=tokens,
        lengths=torch.tensor(lengths, dtype=torch.int64),
        points=columns[..., 0],
        sizes=columns[..., 1],
        firsts=columns[..., 2],
        latents=latents,
        width=max(ends, default=0) + draw(st.integers(0, 2)),
    )
