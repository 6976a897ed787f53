"""The reasoner: the frozen language model that answers. Its weights are never trained; a comparator may put an adapter on them."""

from __future__ import annotations

from typing import cast, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from memgen.kernels import chunk_rows, linear_logprob
from memgen.model.backbone import Backbone
from memgen.model.cache import View


@final
class Reasoner(nn.Module):
    """Reads a stream of tokens and latents; its head is applied only where logits are needed.

    Args:
        backbone: the frozen base.
        end_ids: token ids that end an answer.
        adapter: adapter of the base that every pass applies; None: the bare base, as MemGen's.
    """

    def __init__(self, backbone: Backbone, end_ids: tuple[int, ...], adapter: str | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.end_ids = end_ids
        self.adapter = adapter

    def end_at(self, token: int) -> None:
        """Ends answers at one more token: a chat template's end of turn need not be the model's end of sequence."""
        self.end_ids = tuple(sorted({*self.end_ids, token}))

    def read(self, embeddings: Float[Tensor, "time hidden"], view: View) -> Float[Tensor, "read hidden"]:
        """Hidden states of those packed stream positions that the pass reads."""
        hidden: Tensor = self.backbone(embeddings, view, self.adapter)
        return hidden

    def logits(self, hidden: Float[Tensor, "*shape hidden"]) -> Float[Tensor, "*shape vocab"]:
        """Next-token logits, float32."""
        return cast(Tensor, self.backbone.head(hidden)).float()

    def logprobs(
        self,
        hidden: Float[Tensor, "labels hidden"],
        targets: Int[Tensor, " labels"],
        *,
        temperature: float = 1.0,
        entropy: bool = False,
    ) -> tuple[Float[Tensor, " labels"], Float[Tensor, " labels"] | None]:
        """Log-probability of a next token for each state, float32, without holding (labels, vocabulary).

        Args:
            hidden: states.
            targets: the next token of each.
            temperature: divides the logits, in float32, as when tokens are sampled.
            entropy: whether to return the entropy of each distribution too, in nats.
        """
        head = self.backbone.head
        bias: Tensor | None = head.bias
        if entropy:
            logprobs, found = linear_logprob(
                hidden, head.weight, targets, bias, entropy=True, temperature=temperature
            )
            return logprobs, found
        return linear_logprob(hidden, head.weight, targets, bias, temperature=temperature), None

    @torch.no_grad()
    def predictions(self, hidden: Float[Tensor, "labels hidden"]) -> Int[Tensor, " labels"]:
        """The most probable next token for each state, without holding (labels, vocabulary)."""
        head = self.backbone.head
        parts = [head(part).argmax(dim=-1) for part in hidden.split(chunk_rows(head.weight))]
        return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.int64)
