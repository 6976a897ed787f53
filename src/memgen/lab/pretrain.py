"""Pretrains the lab's reasoner: a Qwen3 of about 0.3 million parameters, on the documents of `lab.documents`.

Qwen3 rather than Qwen2 for two reasons: with its normalised queries and keys the tasks are learnt in fewer steps, and
`AutoTokenizer` gives a Qwen2 model Qwen2's tokenizer, whichever was saved with it.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from memgen.lab.documents import Document, DocumentMix, draw_document
from memgen.types import TokenBatch

# B rows, L token positions, V vocabulary size

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReasonerRecipe:
    """All that decides the reasoner's weights, on a given machine."""

    seed: int = 0
    """Seed of the initial weights and of the documents."""
    steps: int = 1950
    batch_size: int = 32
    learning_rate: float = 2e-3
    """Peak of the schedule: linear warm-up, then a cosine to zero."""
    warmup_steps: int = 50
    weight_decay: float = 0.01
    gradient_clip: float = 1.0
    hidden_size: int = 96
    layers: int = 3
    heads: int = 4
    key_value_heads: int = 2
    intermediate_size: int = 256
    init_std: float = 0.08
    mix: DocumentMix = field(default_factory=DocumentMix)
    """What the documents are made of."""


def pretrain_reasoner(recipe: ReasonerRecipe, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """Trains a reasoner from scratch, showing a progress bar with the loss on stderr.

    It runs on one CPU thread: at this size more are no faster, and the sums keep their order. The caller's random state,
    gradient mode and thread count are as before when it returns.

    Args:
        recipe: what to train.
        tokenizer: the lab's tokenizer.

    Returns:
        The model, float32, on CPU, in evaluation mode.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
            torch.manual_seed(recipe.seed)
            return _train(recipe, _initial_model(recipe, tokenizer), tokenizer)
    finally:
        torch.set_num_threads(threads)


def _initial_model(recipe: ReasonerRecipe, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.key_value_heads,
        head_dim=recipe.hidden_size // recipe.heads,
        intermediate_size=recipe.intermediate_size,
        initializer_range=recipe.init_std,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    return Qwen3ForCausalLM(config).to(torch.float32)


def _train(
    recipe: ReasonerRecipe, model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> Qwen3ForCausalLM:
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=recipe.weight_decay
    )
    batches = _batches(recipe, tokenizer)
    model.train()
    average = math.nan
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("Pretraining the lab's reasoner", total=recipe.steps, loss=average)
        for step in range(recipe.steps):
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * schedule(step, recipe.warmup_steps, recipe.steps)
            loss = _loss(model, next(batches))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.gradient_clip)
            optimizer.step()
            optimizer.zero_grad()
            average = loss.item() if math.isnan(average) else 0.98 * average + 0.02 * loss.item()
            progress.update(bar, advance=1, loss=average)
            if (step + 1) % 100 == 0:
                logger.info("reasoner pretraining: step %d of %d, loss %.3f", step + 1, recipe.steps, average)
    return model.eval()


def schedule(step: int, warmup_steps: int, steps: int) -> float:
    """The share of the peak learning rate at a step: linear warm-up, then half a cosine to zero."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))


def _batches(recipe: ReasonerRecipe, tokenizer: PreTrainedTokenizerFast) -> Iterator[TokenBatch]:
    """Endless batches of documents of similar length."""
    rng = random.Random(f"documents {recipe.seed}")
    pool_batches = 16
    while True:
        pool = [draw_document(recipe.mix, rng) for _ in range(pool_batches * recipe.batch_size)]
        pool.sort(key=lambda document: len(document.tokens))
        starts = list(range(0, len(pool), recipe.batch_size))
        rng.shuffle(starts)
        for start in starts:
            yield _batch(pool[start : start + recipe.batch_size], tokenizer)


def _batch(documents: list[Document], tokenizer: PreTrainedTokenizerFast) -> TokenBatch:
    rows = [tokenizer.convert_tokens_to_ids(list(document.tokens)) for document in documents]
    return TokenBatch.from_rows(rows, [document.supervised for document in documents])


def _loss(model: Qwen3ForCausalLM, batch: TokenBatch) -> torch.Tensor:
    """Mean cross-entropy of the supervised tokens."""
    real = torch.arange(batch.ids.shape[1]) < batch.lengths[:, None]  # (B, L)
    logits = model(input_ids=batch.ids, attention_mask=real.long(), use_cache=False).logits  # (B, L, V)
    targets = batch.supervised[:, 1:]
    return F.cross_entropy(logits[:, :-1][targets], batch.ids[:, 1:][targets])
