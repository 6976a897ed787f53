"""Writes checkpoints until it is killed. An order per line: how, and where; a fork of this process for each."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from memgen.files import new_file, remove_leftovers
from memgen.model.memgen import MemGenConfig
from memgen.model.weaver import WeaverConfig
from memgen.running.resume import LAST, keep_newest
from memgen.training.checkpoint import save_checkpoint
from tiny import LORA, tiny_memgen

CONFIG = MemGenConfig(weaver=WeaverConfig(lora=LORA, prompt_latents=3, inference_latents=2))


def answer(what: object) -> None:
    os.write(1, f"{what}\n".encode())


def write_adapters(directory: Path, model) -> None:
    count = 0
    while True:
        count += 1
        for parameter in model.weaver.own_parameters().values():
            parameter.data.fill_(count)
        save_checkpoint(model, CONFIG, directory, with_trigger=False)
        answer(count)


def write_ckpts(folder: Path, *, parts: bool) -> None:
    link = folder / LAST
    start = int(link.resolve().stem.partition("_")[2]) if link.exists() else 0
    remove_leftovers(folder)
    count = 0
    while True:
        count += 1
        path = folder / f"step_{start + count:06d}.ckpt"
        state = {"tensor": torch.full((30_000,), float(start + count))}
        with new_file(path) as temporary:
            if parts:
                temporary.mkdir()
                torch.save(state, temporary / "rank_0")
                torch.save(state, temporary / "rank_1")
            else:
                torch.save(state, temporary)
        keep_newest(path, keep=1)
        answer(count)


def main() -> None:
    torch.set_num_threads(1)
    model = tiny_memgen()
    for line in sys.stdin:
        way, _, target = line.rstrip("\n").partition("\t")
        pid = os.fork()
        if pid == 0:
            answer(os.getpid())
            if way in ("file", "directory"):
                write_ckpts(Path(target), parts=way == "directory")
            write_adapters(Path(target), model)
        os.waitpid(pid, 0)
        answer("dead")


if __name__ == "__main__":
    main()
