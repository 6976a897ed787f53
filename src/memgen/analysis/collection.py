"""The collection: every woven block of a test run, with where it stood, what followed it and what the episode earned.

A folder holds, once all items are played,

- `latents.safetensors`: `latents`, float32 (M, H), those of all blocks one behind the other; and for each answer
  the mean vectors of its context and its text, (A, H) each (`VECTORS`);
- `blocks.parquet`: a row per block (`block_records`), `begin` and `count` say which latents are its own;
- `answers.parquet`: a row per item, in the order of the mean vectors.

While items are played, each has a file of its own, which appears whole or not at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from torch import Tensor

from memgen.files import new_file, new_folder
from memgen.model.memgen import MemGenModel
from memgen.types import InsertionKind, InsertionPlan, TokenBatch, Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# M latents of all blocks, A answers, n blocks, H hidden size

Floats = NDArray[np.float32]

VECTORS = ("context_embedding", "context_state", "trajectory_embedding", "trajectory_state")
"""Mean vectors of an answer: of its first prompt and of what the agent wrote; input embeddings, which are the latents'
space, and the reasoner's last hidden states when it reads the text without latents."""
FOLDER = "collection"
FOLLOWED_TOKENS = 32
"""Tokens behind a block that its record keeps as text."""

_LATENTS, _BLOCKS, _ANSWERS = "latents.safetensors", "blocks.parquet", "answers.parquet"


@dataclass(frozen=True)
class Collection:
    """All blocks and answers of a test run.

    Attributes:
        answers: records of `answers.parquet`: `index`, `id`, `task`, `reward`, `failure`, `fault`, ...
        blocks: records of `blocks.parquet`.
        latents: those of all blocks, (M, H).
        vectors: mean vectors of each answer by name, (A, H) each.
    """

    answers: list[dict[str, Any]]
    blocks: list[dict[str, Any]]
    latents: Floats
    vectors: Mapping[str, Floats]

    def block(self, number: int) -> Floats:
        """The latents of a block, (K, H)."""
        begin = self.blocks[number]["begin"]
        return self.latents[begin : begin + self.blocks[number]["count"]]

    def means(self) -> Floats:
        """Each block's mean vector, which represents it in the paper's analysis: (n, H)."""
        return np.stack([self.block(number).mean(axis=0) for number in range(len(self.blocks))])


def block_records(
    tokenizer: PreTrainedTokenizerBase, index: int, task: str, trajectory: Trajectory
) -> list[dict[str, Any]]:
    """Where an episode's blocks stand and what follows them, in order of insertion.

    Args:
        tokenizer: the reasoner's.
        index: of the item.
        task: the item's task.
        trajectory: the episode, played without an intervention.

    Returns:
        For each block: `index`, `task`, `turn`, `number` (in the episode), `position` (token of the turn before which it
        lies; 0: end of the prompt), `share` (the position as a share of the turn), `kind` (prompt or inference),
        `boundary` (the token before it as text, or "end of prompt"), `probability` (of INVOKE), `followed` (the text up
        to the next block, at most `FOLLOWED_TOKENS`), `reward`.
    """
    records: list[dict[str, Any]] = []
    for number, turn in enumerate(trajectory.turns):
        points = turn.insertion_points
        ends = [*points[1:], len(turn.tokens)] if points else []
        for place, end, (point, kind) in zip(points, ends, turn.insertions, strict=True):
            at_prompt = kind == InsertionKind.PROMPT
            before = (turn.context + turn.tokens)[point - 1]
            records.append(
                {
                    "index": index,
                    "task": task,
                    "turn": number,
                    "number": len(records),
                    "position": place,
                    "share": place / max(1, len(turn.tokens)),
                    "kind": InsertionKind(kind).name.lower(),
                    "boundary": "end of prompt" if at_prompt else tokenizer.decode([before]),
                    "probability": turn.invoke_probs[place],
                    "followed": tokenizer.decode(turn.tokens[place : min(end, place + FOLLOWED_TOKENS)]),
                    "reward": trajectory.reward,
                }
            )
    return records


@torch.no_grad()
def mean_vectors(model: MemGenModel, trajectories: Sequence[Trajectory]) -> list[dict[str, Floats]]:
    """The mean vectors (`VECTORS`) of episodes: the reasoner reads each one's text once, without latents.

    The paper compares latents with context states and replayed trajectories (revised version, App. H.4) and does not say
    which states. Here they are last hidden states, and input embeddings beside them, since latents are of that space.

    Args:
        model: its reasoner reads.
        trajectories: with at least one turn each.
    """
    rows = [[*t.turns[-1].context, *t.turns[-1].tokens] for t in trajectories]
    batch = TokenBatch.from_rows(rows)
    read = torch.arange(batch.ids.shape[1]) < batch.lengths[:, None]
    states = model(batch, InsertionPlan.empty(len(rows)), read).hidden.split(batch.lengths.tolist())
    found = []
    for trajectory, row, row_states in zip(trajectories, rows, states, strict=True):
        embeddings = model.reasoner.backbone.embed(torch.tensor(row, device=model.device))
        written = torch.zeros(len(row), dtype=torch.bool)
        for turn in trajectory.turns:
            written[len(turn.context) : len(turn.context) + len(turn.tokens)] = True
        prompt = torch.arange(len(row)) < len(trajectory.turns[0].context)
        means = (_mean(x, mask) for mask in (prompt, written) for x in (embeddings, row_states))
        found.append(dict(zip(VECTORS, means, strict=True)))
    return found


def _mean(vectors: Tensor, mask: Tensor) -> Floats:
    mean: Floats = vectors[mask.to(vectors.device)].float().mean(dim=0).cpu().numpy()
    return mean


# Files


def write_item(folder: Path, index: int, blocks: Sequence[Tensor], vectors: Mapping[str, Floats]) -> None:
    """Writes the tensors of one item, whole or not at all.

    Args:
        folder: of the items.
        index: the item.
        blocks: its blocks in order of insertion, (K, H) each.
        vectors: its mean vectors, (H,) each.
    """
    hidden = next(iter(vectors.values())).shape[0]
    flat = [block.detach().float().cpu().numpy() for block in blocks]
    latents = np.concatenate([np.zeros((0, hidden), np.float32), *flat])
    sizes = np.asarray([len(block) for block in flat], dtype=np.int64)
    with new_file(_item_file(folder, index)) as temporary:
        save_file({"latents": latents, "count": sizes, **vectors}, temporary)


def merge_items(
    folder: Path, answers: Sequence[Mapping[str, Any]], blocks: Sequence[Mapping[str, Any]], items: Path
) -> None:
    """Makes the collection of all items' files; it appears whole or not at all.

    Args:
        folder: of the collection.
        answers: a record of each item, without those that the environment failed.
        blocks: a record of each block, those of an item in order of insertion.
        items: the folder of the items' files.
    """
    tensors = [load_file(_item_file(items, answer["index"])) for answer in answers]
    sizes = {a["index"]: t["count"].tolist() for a, t in zip(answers, tensors, strict=True)}
    order = {answer["index"]: number for number, answer in enumerate(answers)}
    ordered = sorted(blocks, key=lambda block: (order[block["index"]], block["number"]))
    rows, begin = [], 0
    for block in ordered:
        size = sizes[block["index"]][block["number"]]
        rows.append({**block, "begin": begin, "count": size})
        begin += size
    with new_folder(folder) as temporary:
        stacked = {name: np.stack([tensor[name] for tensor in tensors]) for name in VECTORS}
        stacked["latents"] = np.concatenate([tensor["latents"] for tensor in tensors])
        save_file(stacked, temporary / _LATENTS)
        pq.write_table(pa.Table.from_pylist(rows), temporary / _BLOCKS)
        pq.write_table(pa.Table.from_pylist([dict(answer) for answer in answers]), temporary / _ANSWERS)


def read_collection(folder: Path) -> Collection:
    """Reads a collection.

    Raises:
        FileNotFoundError: if it is not complete.
    """
    if not (folder / _LATENTS).is_file():
        raise FileNotFoundError(
            f"{folder} holds no complete collection: it has no {_LATENTS}; the memgen analyze that began it goes on where "
            "it stopped"
        )
    tensors = load_file(folder / _LATENTS)
    return Collection(
        answers=pq.read_table(folder / _ANSWERS).to_pylist(),
        blocks=pq.read_table(folder / _BLOCKS).to_pylist(),
        latents=tensors["latents"],
        vectors={name: tensors[name] for name in VECTORS},
    )


def _item_file(folder: Path, index: int) -> Path:
    return folder / f"{index:06d}.safetensors"
