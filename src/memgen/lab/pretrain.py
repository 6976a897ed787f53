"""Pretrains the lab's reasoner: a Qwen3 of about 0.3 million parameters, on the documents of `lab.documents`.

It is trained on recalls alone until it can look up, then on the mixture. What made the difference, at equal steps:
large embeddings and small output maps at the start, this order, and Muon for the matrices in the second part.

Qwen3 rather than Qwen2 for two reasons: with its normalised queries and keys the tasks are learnt in fewer steps, and
`AutoTokenizer` gives a Qwen2 model Qwen2's tokenizer, whichever was saved with it.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import final

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from memgen.lab.documents import Document, DocumentMix, random_document
from memgen.types import TokenBatch

# B rows, L token positions, V vocabulary size

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReasonerRecipe:
    """Settings that decide the reasoner's weights, on a given machine."""

    seed: int = 0
    """Seed of the initial weights and of the documents."""
    recall_steps: int = 1000
    """Most steps on recalls alone, before all else: with looking up in hand, the mixture is learnt much faster."""
    recall_loss: float = 0.1
    """Mean loss at which looking up counts as learnt and the mixture begins."""
    recall_learning_rate: float = 1.2e-3
    """AdamW's; constant after a linear warm-up."""
    steps: int = 2400
    """Steps on the mixture."""
    batch_size: int = 32
    learning_rate: float = 1.2e-3
    """AdamW's, for embeddings and norms; peak of the schedule: linear warm-up, then a cosine to zero."""
    matrix_learning_rate: float = 0.02
    """Muon's, for all other weights, on the same schedule."""
    warmup_steps: int = 50
    weight_decay: float = 0.01
    gradient_clip: float = 1.0
    hidden_size: int = 96
    layers: int = 3
    heads: int = 4
    key_value_heads: int = 2
    intermediate_size: int = 256
    init_std: float = 0.08
    """Spread of the initial linear maps that read; those that write into the residual stream get `output_std`."""
    embedding_std: float = 0.3
    """Spread of the initial embeddings: large against what the layers add, so that looking up forms early."""
    output_std: float = 0.02
    mix: DocumentMix = field(default_factory=DocumentMix)
    """The mixture of documents."""


def pretrain_reasoner(recipe: ReasonerRecipe, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """Trains a reasoner from scratch, showing a progress bar with the loss on stderr.

    It runs on one CPU thread: at this size more are no faster, and the sums keep their order. The caller's random state,
    gradient mode and thread count are as before when it returns.

    Args:
        recipe: the settings.
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
    model = Qwen3ForCausalLM(config).to(torch.float32)
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(0.0, recipe.embedding_std)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.normal_(0.0, recipe.output_std)
            layer.mlp.down_proj.weight.normal_(0.0, recipe.output_std)
    return model


def _train(
    recipe: ReasonerRecipe, model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> Qwen3ForCausalLM:
    recalls = _batches(DocumentMix.of("recall"), f"recalls {recipe.seed}", recipe.batch_size, tokenizer)
    mixture = _batches(recipe.mix, f"documents {recipe.seed}", recipe.batch_size, tokenizer)
    model.train()
    with _progress() as progress:
        optimizers = _recall_optimizers(recipe, model)
        losses = _Average()
        bar = progress.add_task(
            "The lab's reasoner learns to look up", total=recipe.recall_steps, loss=math.nan
        )
        for step in range(recipe.recall_steps):
            share = min(1.0, (step + 1) / recipe.warmup_steps)
            average = losses.add(_step(model, next(recalls), optimizers, share, recipe.gradient_clip))
            progress.update(bar, advance=1, loss=average)
            if average < recipe.recall_loss:
                break
        logger.info("reasoner pretraining: looking up learnt in %d steps, loss %.3f", step + 1, average)
        progress.remove_task(bar)
        optimizers, losses = _mixture_optimizers(recipe, model), _Average()
        bar = progress.add_task("Pretraining the lab's reasoner", total=recipe.steps, loss=math.nan)
        for step in range(recipe.steps):
            share = schedule(step, recipe.warmup_steps, recipe.steps)
            average = losses.add(_step(model, next(mixture), optimizers, share, recipe.gradient_clip))
            progress.update(bar, advance=1, loss=average)
            if (step + 1) % 100 == 0:
                logger.info("reasoner pretraining: step %d of %d, loss %.3f", step + 1, recipe.steps, average)
    return model.eval()


@final
class _Average:
    """A running mean."""

    def __init__(self) -> None:
        self.value = math.nan

    def add(self, value: float) -> float:
        self.value = value if math.isnan(self.value) else 0.98 * self.value + 0.02 * value
        return self.value


def _progress() -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True), transient=True)


def _step(
    model: Qwen3ForCausalLM,
    batch: TokenBatch,
    optimizers: list[tuple[torch.optim.Optimizer, float]],
    share: float,
    gradient_clip: float,
) -> float:
    """One optimizer step at a share of the peak rates; returns the loss."""
    loss = supervised_loss(model, batch)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), gradient_clip)
    for optimizer, peak in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = peak * share
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def _recall_optimizers(
    recipe: ReasonerRecipe, model: Qwen3ForCausalLM
) -> list[tuple[torch.optim.Optimizer, float]]:
    """Optimizers with their peak rates. AdamW alone: with Muon looking up is not learnt in this number of steps."""
    return [(_adamw(recipe, list(model.parameters())), recipe.recall_learning_rate)]


def _mixture_optimizers(
    recipe: ReasonerRecipe, model: Qwen3ForCausalLM
) -> list[tuple[torch.optim.Optimizer, float]]:
    """Optimizers with their peak rates: Muon for the matrices of the layers, AdamW for the rest."""
    matrices = [parameter for parameter in model.model.layers.parameters() if parameter.ndim == 2]
    taken = {id(parameter) for parameter in matrices}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in taken]
    muon = torch.optim.Muon(matrices, weight_decay=recipe.weight_decay)
    return [(_adamw(recipe, rest), recipe.learning_rate), (muon, recipe.matrix_learning_rate)]


def _adamw(recipe: ReasonerRecipe, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=recipe.weight_decay)


def schedule(step: int, warmup_steps: int, steps: int) -> float:
    """The share of the peak learning rate at a step: linear warm-up, then half a cosine to zero.

    transformers' cosine schedules are others: they start their warm-up at 0, or end their cosine a step earlier.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))


def _batches(
    mix: DocumentMix, seed: str, batch_size: int, tokenizer: PreTrainedTokenizerFast
) -> Iterator[TokenBatch]:
    """Endless batches of documents of similar length."""
    rng = random.Random(seed)
    pool_batches = 16
    while True:
        pool = [random_document(mix, rng) for _ in range(pool_batches * batch_size)]
        pool.sort(key=lambda document: len(document.tokens))
        starts = list(range(0, len(pool), batch_size))
        rng.shuffle(starts)
        for start in starts:
            yield _batch(pool[start : start + batch_size], tokenizer)


def _batch(documents: list[Document], tokenizer: PreTrainedTokenizerFast) -> TokenBatch:
    rows = [tokenizer.convert_tokens_to_ids(list(document.tokens)) for document in documents]
    return TokenBatch.from_rows(rows, [document.supervised for document in documents])


def supervised_loss(model: Qwen3ForCausalLM, batch: TokenBatch) -> torch.Tensor:
    """Mean cross-entropy of the supervised tokens."""
    real = torch.arange(batch.ids.shape[1]) < batch.lengths[:, None]  # (B, L)
    logits = model(input_ids=batch.ids, attention_mask=real.long(), use_cache=False).logits  # (B, L, V)
    targets = batch.supervised[:, 1:]
    return F.cross_entropy(logits[:, :-1][targets].float(), batch.ids[:, 1:][targets])
