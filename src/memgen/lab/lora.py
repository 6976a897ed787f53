"""Control without latents: LoRA on the reasoner itself, trained on the same solved problems as the weaver.

It measures what plain fine-tuning gains from the same data, and loses on the other tasks, with and without replaying
them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.utils import clip_grad_norm_
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from memgen.chat import conversation_ids, load_tokenizer
from memgen.environments.base import Environment
from memgen.lab.pretrain import supervised_loss
from memgen.lab.saving import save_backbone
from memgen.model.adapters import LoraSettings
from memgen.training.optimizer import OptimizerSettings
from memgen.types import TokenBatch

Row = tuple[list[int], list[bool]]
"""Token ids of an item, and which of them are learnt."""


@dataclass(frozen=True)
class Replay:
    """Training items of tasks that were learnt before, mixed into every batch (experience replay).

    Attributes:
        environments: the earlier tasks.
        items: first training items of each that are kept.
        share: of a batch's rows, rounded to whole ones, at least one and not all.
    """

    environments: Sequence[Environment]
    items: int
    share: float

    def rows(self, batch_size: int) -> int:
        """Rows of a batch that replay earlier tasks.

        Raises:
            ValueError: if a batch has no room for a row of both.
        """
        if batch_size < 2:
            raise ValueError(
                f"a batch of {batch_size} has no room for replay; set data.batch_size to 2 or more"
            )
        return min(max(1, round(self.share * batch_size)), batch_size - 1)


def train_lora(
    base: str,
    environment: Environment,
    directory: Path,
    *,
    lora: LoraSettings,
    optimizer: OptimizerSettings,
    steps: int,
    batch_size: int,
    seed: int,
    dtype: torch.dtype = torch.float32,
    every_turn: bool = False,
    replay: Replay | None = None,
) -> None:
    """Fine-tunes a reasoner on an environment's reference answers and writes it, merged, as a base of its own.

    Args:
        base: directory of the reasoner.
        environment: whose training split it learns from; a mixture of tasks replays the others.
        directory: where the merged model and its tokenizer go.
        lora: the adapter; a weaver's, to compare with it.
        optimizer: likewise.
        steps: optimizer steps.
        batch_size: items per step, replayed ones included.
        seed: of the adapter's initial weights and of the data order.
        dtype: of the reasoner, in which the adapter is merged; the adapter is float32 while it is trained.
        every_turn: learn every turn of the assistant; else the last one, and earlier ones are part of the question.
        replay: earlier tasks in every batch; None: none.

    Raises:
        ValueError: if there are fewer training items than a batch takes.
    """
    tokenizer = load_tokenizer(base)
    rows = _rows(environment, tokenizer, every_turn)
    replayed = 0
    replays: Iterator[list[Row]] = repeat([])
    if replay is not None:
        replayed = replay.rows(batch_size)
        kept = [
            row
            for found in replay.environments
            for row in _rows(found, tokenizer, every_turn)[: replay.items]
        ]
        replays = _batches(kept, replayed, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(base, dtype=dtype),
            LoraConfig(
                r=lora.r,
                lora_alpha=lora.alpha,
                lora_dropout=lora.dropout,
                target_modules=list(lora.target_modules),
                task_type="CAUSAL_LM",
            ),
        )
        model.train()
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        built = optimizer.build(parameters, steps)
        batches = _batches(rows, batch_size - replayed, seed)
        for _ in range(steps):
            batch = next(batches) + next(replays)
            supervised_loss(
                model, TokenBatch.from_rows([ids for ids, _ in batch], [marks for _, marks in batch])
            ).backward()
            clip_grad_norm_(parameters, 1.0)
            built["optimizer"].step()
            built["optimizer"].zero_grad()
            built["lr_scheduler"]["scheduler"].step()
    save_backbone(model.merge_and_unload().eval(), tokenizer, directory)


def _rows(environment: Environment, tokenizer: PreTrainedTokenizerBase, every_turn: bool) -> list[Row]:
    rows = []
    for example in environment.examples("train"):
        chat = conversation_ids(tokenizer, environment.conversation(example))
        if every_turn:
            learnt = {index for turn in chat.turns for index in range(turn.prompt_end, turn.end)}
        else:
            learnt = set(range(chat.turns[-1].prompt_end, len(chat.ids)))
        rows.append((chat.ids, [index in learnt for index in range(len(chat.ids))]))
    return rows


def _batches(rows: Sequence[Row], size: int, seed: int) -> Iterator[list[Row]]:
    """Endless batches of rows, every epoch in another order."""
    if len(rows) < size:
        raise ValueError(
            f"a batch takes {size} training items of a task, but there are {len(rows)}; set data.batch_size lower"
        )
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(rows), generator=generator).tolist()
        for begin in range(0, len(order) - size + 1, size):
            yield [rows[index] for index in order[begin : begin + size]]
