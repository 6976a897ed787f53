"""Whether a model that is read through memgen's attention still says what it says by itself: tried once, at the load.

A model may compute attention by itself, take positions from their order, scale its logits, or mix neighbours in some
other way, and nothing in its configuration need tell. So before its attention is replaced it reads two rows, each
alone: a short one at the first positions, and a longer one at the last positions of its context. Afterwards both are
read in one packed pass, their positions interleaved, and the logits must be the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from typing_extensions import override

from memgen.model.cache import View

# R rows, T positions of all rows, V vocabulary

_LENGTHS = (4, 6)
"""Positions of the two rows."""
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4}
"""Relative error of the logits; 5e-2 in lower types."""


@final
class RowsView(View):
    """A pass over rows whose positions lie anywhere in the packed input: causal attention within each row.

    Args:
        positions: of the packed input, (T,).
        rows: the row of each position, (T,).
    """

    def __init__(self, positions: Tensor, rows: Tensor) -> None:
        self.positions = positions
        self.limit = int(positions.max()) + 1
        self._rows = rows
        self._layers: list[int] = []

    def incomplete(self, layers: int) -> str | None:
        """What a model does that has not called this once for each of its layers, in their order; None: it has."""
        if self._layers == list(range(layers)):
            return None
        return f"calls attention for its layers {self._layers}, not once for each of {layers}"

    @override
    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        window: int | None,
        *,
        narrowed: bool = False,
    ) -> Tensor:
        self._layers.append(layer)
        behind = self.positions[:, None] - self.positions
        seen = (self._rows[:, None] == self._rows) & (behind >= 0)
        if window is not None:
            seen &= behind < window
        grouped = query.shape[1] > key.shape[1]
        attended = F.scaled_dot_product_attention(
            query, key, value, attn_mask=seen, scale=scale, enable_gqa=grouped
        )
        return attended.transpose(1, 2)


@dataclass(frozen=True)
class Proof:
    """Two rows in one packed line, and what the model says to each of them alone."""

    ids: Tensor
    """Token ids, int64 (T,)."""
    positions: Tensor
    """Position ids, int64 (T,)."""
    rows: Tensor
    """Row of each position, int64 (T,)."""
    logits: Tensor
    """The model's own, (T, V)."""

    @classmethod
    @torch.no_grad()
    def of(cls, model: PreTrainedModel, context: int) -> Proof:
        """Lets a model read the rows with its own attention.

        Args:
            model: a causal language model, in evaluation mode.
            context: its longest stream.
        """
        if model.config._attn_implementation not in ("eager", "sdpa"):
            model.set_attn_implementation("eager")
        device = model.get_input_embeddings().weight.device
        vocabulary = int(model.get_input_embeddings().weight.shape[0])
        parts = []
        for row, length in enumerate(_LENGTHS):
            length = min(length, context)
            begin = 0 if row == 0 else context - length
            positions = torch.arange(begin, begin + length, device=device)
            ids = (torch.arange(length, device=device) * 17 + 5 * row + 3) % vocabulary
            logits = model(input_ids=ids[None], position_ids=positions[None], use_cache=False).logits[0]
            parts.append((ids, positions, torch.full_like(ids, row), logits))
        ids, positions, rows, logits = (torch.cat(column) for column in zip(*parts, strict=True))
        # Interleaved, so that each position has a neighbour of the other row.
        order = torch.argsort(
            torch.cat([torch.arange(len(part[0]), device=device) for part in parts]), stable=True
        )
        return cls(ids[order], positions[order], rows[order], logits[order])

    def view(self) -> RowsView:
        """The packed pass over both rows."""
        return RowsView(self.positions, self.rows)

    def problem(self, hidden: Tensor, head: nn.Linear) -> str | None:
        """How the logits of the packed pass differ from the model's own; None: they do not.

        Args:
            hidden: the pass's hidden states behind the final norm, (T, H).
            head: the language-model head, as memgen reads it.
        """
        ours = F.linear(hidden, head.weight, head.bias).float()
        theirs = self.logits.float()
        for row, where in enumerate(("its first positions", "the end of its context")):
            mine = self.rows == row
            errors = (ours[mine] - theirs[mine]).norm(dim=-1) / theirs[mine].norm(dim=-1).clamp(min=1e-30)
            # In low precision a rounding may send one position to other experts.
            low = self.logits.dtype not in _TOLERANCE
            error = float(errors.median() if low else errors.max())
            if not error <= _TOLERANCE.get(self.logits.dtype, 5e-2):
                return f"says something else at {where} when its rows are read beside each other (by {error:.2g})"
        return None
