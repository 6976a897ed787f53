"""Control without latents: LoRA on the reasoner itself, trained on the same solved problems as the weaver.

It measures what plain fine-tuning gains from the same data, and loses on the other tasks, with and without replaying
them.
"""

from __future__ import annotations

from collections.abc import Iterator
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
) -> None:
    """Fine-tunes a reasoner on an environment's reference answers and writes it, merged, as a base of its own.

    Args:
        base: directory of the reasoner.
        environment: whose training split it learns from; a mixture of tasks replays the others.
        directory: where the merged model and its tokenizer go.
        lora: the adapter; a weaver's, to compare with it.
        optimizer: likewise.
        steps: optimizer steps.
        batch_size: items per step.
        seed: of the adapter's initial weights and of the data order.
        dtype: of the reasoner, in which the adapter is merged; the adapter is float32 while it is trained.
    """
    tokenizer = load_tokenizer(base)
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
        batches = _batches(environment, tokenizer, batch_size, seed)
        for _ in range(steps):
            supervised_loss(model, next(batches)).backward()
            clip_grad_norm_(parameters, 1.0)
            built["optimizer"].step()
            built["optimizer"].zero_grad()
            built["lr_scheduler"]["scheduler"].step()
    save_backbone(model.merge_and_unload().eval(), tokenizer, directory)


def _batches(
    environment: Environment, tokenizer: PreTrainedTokenizerBase, batch_size: int, seed: int
) -> Iterator[TokenBatch]:
    """Endless batches, every epoch in another order."""
    items = []
    for example in environment.examples("train"):
        chat = conversation_ids(tokenizer, environment.conversation(example))
        # Earlier turns are part of the question.
        items.append((chat.ids, [index >= chat.turns[-1].prompt_end for index in range(len(chat.ids))]))
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(items), generator=generator).tolist()
        for begin in range(0, len(order) - batch_size + 1, batch_size):
            rows = [items[index] for index in order[begin : begin + batch_size]]
            yield TokenBatch.from_rows([ids for ids, _ in rows], [marks for _, marks in rows])
