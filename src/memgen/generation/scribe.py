"""The reasoner as the scribe of a text memory: it answers without latents, through the same decoding as ever."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from typing_extensions import override

from memgen.chat import ChatTemplate, prompt_ids
from memgen.generation.decode import generate
from memgen.generation.sampling import GenerationSettings
from memgen.memories.scribe import Completion, Scribe, ScribeError
from memgen.model.memgen import MemGenModel
from memgen.seeds import seed_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@final
class ReasonerScribe(Scribe):
    """A model of ours that writes memory."""

    def __init__(
        self,
        model: MemGenModel,
        tokenizer: PreTrainedTokenizerBase,
        template: ChatTemplate | str | None = None,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> None:
        """Asks nothing yet.

        Args:
            model: in evaluation mode. With a trigger that never invokes it is the bare reasoner.
            tokenizer: the reasoner's.
            template: a chat template in place of the tokenizer's.
            temperature: of sampling; 0 is greedy.
            seed: of sampling, for each prompt its own.
        """
        super().__init__()
        self.id = f"reasoner {model.reasoner.backbone.name}"
        self.model = model
        self.tokenizer = tokenizer
        self.template = template
        self.temperature = temperature
        self.seed = seed

    @override
    def complete(self, prompt: str, max_tokens: int) -> Completion:
        settings = GenerationSettings(
            max_new_tokens=max_tokens,
            temperature=self.temperature,
            seed=seed_of("scribe", self.seed, prompt) % 2**31,
        )
        try:
            ids = prompt_ids(self.tokenizer, [{"role": "user", "content": prompt}], self.template)
            turn = generate(self.model, [ids], settings).turns[0]
        except ValueError as error:  # longer than the context, or words that the tokenizer does not know
            raise ScribeError(str(error)) from error
        text = str(self.tokenizer.decode(turn.tokens, skip_special_tokens=True))
        return Completion(text, len(ids), len(turn.tokens))
