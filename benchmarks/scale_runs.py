"""Every stage under every strategy on small models: `python -m benchmarks.scale_runs` (`make bench-scale`).

One process, DDP on two, ZeRO 1, 2 and 3 on two take 12 steps on the same items; the reinforcement stages on the
rollouts that the single process recorded. Compared are losses and the trained weights; measured are the bytes of each
kind that a rank holds, what it gathers, its peak memory, and the sizes of checkpoints. Each stage is also killed
(SIGKILL, all ranks) behind step 9, resumed from its checkpoint of step 6, and compared with the run that was not.

The figures go to docs/results/scale/runs.json and from there into the tables of docs/scale.md.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import logging
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, cast, final

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from typing_extensions import override

from benchmarks.scale import STRATEGIES, Decoder, WeaverSize
from memgen.bench.record import Recorder
from memgen.bench.timing import ProcessMeter
from memgen.data import EnvironmentData
from memgen.distributed.collectives import over_ranks
from memgen.distributed.zero import ZeroStrategy
from memgen.environments.base import Environment, Example, Message, Reward, Split
from memgen.generation.rollout import Actor, Rollouts
from memgen.generation.sampling import GenerationSettings
from memgen.model.adapters import LoraSettings
from memgen.model.backbone import BackboneConfig
from memgen.model.boundary import BoundaryConfig
from memgen.model.memgen import MemGenConfig
from memgen.model.trigger import TriggerConfig
from memgen.model.weaver import WeaverConfig
from memgen.objectives.policy_settings import PolicySettings
from memgen.objectives.sft import Curriculum
from memgen.training import playing
from memgen.training.callbacks import AdapterCheckpoint
from memgen.training.micro_batches import UpdateSettings
from memgen.training.optimizer import OptimizerSettings
from memgen.training.trigger_rl import TriggerRL
from memgen.training.weaver_grpo import WeaverGRPO
from memgen.training.weaver_sft import WeaverSFT
from memgen.types import AgentTurn, Trajectory, WorkCount

logger = logging.getLogger(__name__)

RESULTS = Path("docs/results/scale/runs.json")
STEPS, SAVED, KILLED = 12, 6, 9
STAGES = ("weaver SFT", "weaver GRPO", "trigger RL")
Stage = Literal["weaver SFT", "weaver GRPO", "trigger RL"]
BASE = Decoder(256, 4, 4, 2, 64, 704, 260, tied=True)
"""3 million frozen weights."""
WEAVER = WeaverSize(rank=8, targets=("q_proj", "v_proj"), prompt_latents=4, inference_latents=4)
ITEMS = 24
GROUP = 2
BATCH = {"weaver SFT": 8, "weaver GRPO": 4, "trigger RL": 4}
"""Items of a step, over all ranks."""
LIMIT_SECONDS = 1800.0
NUDGED = "nudged"
"""The single process again, from trained weights one rounding unit off: the yardstick for the differences."""
RUNS = (STRATEGIES[0], NUDGED, *STRATEGIES[1:])


# The task


@final
class Answers(Environment):
    """Sentences of unequal length, with 0 to 4 delimiters. An answer is rewarded by its share of vowels."""

    name = "answers"

    @override
    def examples(self, split: Split) -> list[Example]:
        made = []
        for index in range(ITEMS):
            words = ["abcdefg"[: 2 + (index + place) % 5] for place in range(1 + index % 5)]
            text = ", ".join(words) + "."
            made.append(Example(id=f"{split}-{index}", question=f"say {index}", target=text, answer=text))
        return made

    @override
    def messages(self, example: Example) -> list[Message]:
        return [{"role": "user", "content": example.question}]

    @override
    def reward(self, example: Example, answer: str) -> Reward:
        share = sum(letter in "aeiou" for letter in answer.lower()) / max(1, len(answer))
        return Reward(share, {"vowels": share})


def write_base(directory: Path) -> None:
    """A random Qwen2 of the shape `BASE` and a byte-level tokenizer."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=BASE.vocabulary,
        hidden_size=BASE.hidden,
        num_hidden_layers=BASE.layers,
        num_attention_heads=BASE.heads,
        num_key_value_heads=BASE.kv_heads,
        intermediate_size=BASE.feed_forward,
        max_position_embeddings=512,
        initializer_range=0.07,
        tie_word_embeddings=BASE.tied,
        eos_token_id=258,
        pad_token_id=None,
        bos_token_id=None,
    )
    Qwen2ForCausalLM(config).save_pretrained(directory)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(
        [AddedToken(token, special=True) for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", clean_up_tokenization_spaces=False
    ).save_pretrained(directory)


def make_stage(kind: Stage, base: Path) -> LightningModule:
    """A stage whose initial weights are the same in every process."""
    torch.manual_seed(0)
    lora = LoraSettings(r=WEAVER.rank, alpha=2 * WEAVER.rank, dropout=0.0, target_modules=WEAVER.targets)
    config = MemGenConfig(
        backbone=BackboneConfig(name=str(base)),
        weaver=WeaverConfig(
            lora=lora,
            prompt_latents=WEAVER.prompt_latents,
            inference_latents=WEAVER.inference_latents,
        ),
        trigger=TriggerConfig(kind="tokens" if kind == "trigger RL" else "always", lora=lora),
        boundaries=BoundaryConfig(
            # A random model writes few commas.
            delimiters=(",", ".") if kind == "weaver SFT" else tuple("abcdefghijklmnopqrstuvwxyz"),
            max_inference_insertions=3,
        ),
    )
    optimizer = OptimizerSettings(lr=1e-3, warmup_ratio=0.0, final_lr_ratio=1.0)
    # Two updates of each rollout: the first one's ratio is 1, which tells less.
    update = UpdateSettings(iterations=2)
    rollout = GenerationSettings(
        max_new_tokens=12, temperature=1.0, group_size=GROUP, sample_decisions=kind == "trigger RL"
    )
    match kind:
        case "weaver SFT":
            mixed = Curriculum(first=0.25, all=0.25, random=0.25, none=0.25)
            return WeaverSFT(config, optimizer, curriculum=mixed)
        case "weaver GRPO":
            policy = PolicySettings(loss="dapo", kl=0.02, advantage_scale="batch")
            return WeaverGRPO(
                config, optimizer, policy=policy, update=update, rollout=rollout, samples_every=0
            )
        case "trigger RL":
            policy = PolicySettings(kl=0.02, advantage_scale="batch")
            return TriggerRL(
                config,
                optimizer,
                policy=policy,
                update=update,
                rollout=rollout,
                allow_untrained_weaver=True,
                samples_every=0,
            )


# Measurements


@final
class Watch(Callback):
    """Losses over all ranks, and bytes that a rank holds.

    Args:
        save: where to write a checkpoint behind step `SAVED`.
        kill: whether to end all ranks behind step `KILLED`.
        nudge: whether to start from trained weights that are a rounding unit off.
    """

    def __init__(self, save: Path | None, *, kill: bool, nudge: bool) -> None:
        self.save = save
        self.kill = kill
        self.nudge = nudge
        self.losses: list[float] = []
        self.bytes: dict[str, int] = {}
        self.most_weights = 0
        self.gathered_bytes: list[int] = []
        self.passes: list[list[int]] = []
        """Passes of each step: without gradient, with."""
        self._gathered = 0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.bytes |= held_weights(pl_module)
        if self.nudge:
            _nudge(pl_module)
        if isinstance(pl_module, WeaverSFT):
            (base,) = pl_module.memgen.bases()
            forward = base.forward

            def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
                self.passes[-1][int(torch.is_grad_enabled())] += 1
                return forward(*args, **kwargs)

            # Not a hook: a pass that another rank waits for is made without the module's call.
            base.forward = counted  # type: ignore[method-assign]

    def count_gathers(self) -> Callable[[], None]:
        """Counts gathered bytes from now on; returns a function that ends it."""
        from deepspeed import comm

        gather = comm.allgather_fn

        def counted(output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self._gathered += output.numel() * output.element_size()
            return gather(output, *args, **kwargs)

        comm.allgather_fn = counted
        return lambda: setattr(comm, "allgather_fn", gather)

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._gathered = 0
        self.passes.append([0, 0])

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self.most_weights = max(self.most_weights, held_weights(pl_module)["frozen"])

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.gathered_bytes.append(self._gathered)
        loss = over_ranks(outputs["loss"].detach().double().reshape(1), "sum")
        self.losses.append(float(loss) / trainer.world_size)
        self.bytes["optimizer"] = moments(trainer)
        if trainer.global_step == SAVED and self.save is not None:
            trainer.save_checkpoint(self.save)
        if trainer.global_step == KILLED and self.kill:
            trainer.strategy.barrier()
            # All ranks are of this process's group.
            os.killpg(os.getpgid(0), signal.SIGKILL)


@torch.no_grad()
def _nudge(module: LightningModule) -> None:
    """Multiplies every trained number by 1 plus or minus a float32 rounding unit."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        if parameter.requires_grad:
            signs = torch.randn(parameter.shape, generator=generator).sign()
            parameter.mul_(1 + torch.finfo(torch.float32).eps / 2 * signs)


def held_weights(module: LightningModule) -> dict[str, int]:
    """Bytes of frozen and of trained weights that this process holds in whatever form, tied ones once."""
    found: dict[str, dict[int, int]] = {"frozen": {}, "trained": {}}
    for parameter in module.parameters():
        kind = found["trained" if parameter.requires_grad else "frozen"]
        for tensor in (parameter.data, getattr(parameter, "ds_tensor", None)):
            if tensor is not None and tensor.numel():
                kind[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
    return {name: sum(sizes.values()) for name, sizes in found.items()}


def moments(trainer: Trainer) -> int:
    """Bytes of the optimizer's running moments on this rank."""
    optimizer: Any = trainer.optimizers[0]
    base = getattr(optimizer, "optimizer", optimizer)
    return sum(
        value.numel() * value.element_size()
        for state in base.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.dim()
    )


# Recorded rollouts


def recorded(path: Path, *, write: bool) -> Callable[[], None]:
    """Replaces rollouts by those of a file, or records them into it; returns a function that ends it.

    Args:
        path: the file; an episode is known by its seed.
        write: whether to roll out and record.
    """
    # The name under which a training step looks it up.
    play = playing.rollout  # type: ignore[attr-defined]
    book: dict[int, Any] = {} if write or not path.exists() else torch.load(path, weights_only=True)

    def rollout(actor: Actor, examples: Sequence[Example], seeds: Sequence[int], **settings: Any) -> Rollouts:
        if write:
            played = play(actor, examples, seeds, **settings)
            book.update(zip(seeds, map(asdict, played.trajectories), strict=True))
            torch.save(book, path)
            return played
        return Rollouts(
            trajectories=[_trajectory(book[seed]) for seed in seeds],
            latents=None,
            work=WorkCount(),
            seconds=1.0,
            environment_seconds=0.0,
        )

    playing.rollout = rollout  # type: ignore[attr-defined]
    return lambda: setattr(playing, "rollout", play)


def _trajectory(state: dict[str, Any]) -> Trajectory:
    return Trajectory(**{**state, "turns": tuple(AgentTurn(**turn) for turn in state["turns"])})


# One run


def ranks_of(name: str) -> int:
    """How many processes a run of the table has."""
    return 1 if name in ("single", NUDGED) else 2


def make_strategy(name: str) -> Any:
    """A strategy by its name in the table."""
    match name:
        case "single" | "nudged":
            return "auto"
        case "ddp":
            return DDPStrategy(process_group_backend="gloo")
        case _:
            return ZeroStrategy(int(name.removeprefix("zero")))


def run(task: dict[str, Any]) -> None:
    """Trains one stage under one strategy and writes this rank's measurements."""
    kind, name, mode = task["stage"], task["strategy"], task["mode"]
    folder = Path(task["folder"])
    place = folder / f"{name}-{kind.replace(' ', '-')}"
    ranks = ranks_of(name)
    # The first run of a single process records the rollouts of all.
    restore = [recorded(folder / f"{kind}.rollouts", write=name == "single" and mode == "whole")]
    gc.collect()
    meter = ProcessMeter()
    meter.reset_peak()
    before = meter.held() or 0
    saved = place.with_name(f"{place.name}.{'killed' if mode != 'whole' else 'whole'}.ckpt")
    watch = Watch(
        saved if mode != "resumed" else None,
        kill=mode == "killed",
        nudge=name == NUDGED and mode != "resumed",
    )
    adapters = AdapterCheckpoint(str(place.with_name(f"{place.name}-{mode}")), None, with_trigger=True)
    if kind != "trigger RL":
        adapters.with_trigger = False
    if name == "zero3":
        restore.append(watch.count_gathers())
    trainer = Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=make_strategy(name),
        max_steps=STEPS,
        max_epochs=-1,
        callbacks=[watch, adapters],
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        log_every_n_steps=1,
        default_root_dir=folder,
    )
    stage = make_stage(kind, Path(task["base"]))
    data = EnvironmentData(
        Answers(),
        tokenizer=task["base"],
        chat_template="chatml",
        learn_from="answers" if kind == "weaver SFT" else "rollouts",
        batch_size=BATCH[kind] // ranks,
    )
    begin = saved if mode == "resumed" else None
    trainer.fit(stage, data, ckpt_path=begin, weights_only=True)
    for undo in restore:
        undo()
    assert adapters.run is not None, "the run has had a folder"
    result: dict[str, Any] = {
        "losses": watch.losses,
        "held_bytes": watch.bytes,
        "frozen_bytes_behind_backward": watch.most_weights,
        "gathered_bytes": watch.gathered_bytes,
        "passes": watch.passes,
        "peak_above_start_bytes": (meter.peak() or 0) - before,
    }
    if trainer.is_global_zero:  # It has written them.
        written = adapters.run / "last"
        result |= {
            "adapter_checkpoint_bytes": sum(path.stat().st_size for path in written.iterdir()),
            "resume_checkpoint_bytes": saved.stat().st_size,
            "adapters": str(written),
        }
    path = place.with_name(f"{place.name}-{mode}.{trainer.global_rank}.json")
    path.write_text(json.dumps(result), encoding="utf-8")


# All runs


def launch(tasks: list[dict[str, Any]], log: Path, *, killed: bool) -> None:
    """Runs tasks, one after the other, in processes of their own: one for a single process, two for ranks.

    They are forks of this one, which has imported everything and computed nothing.

    Args:
        tasks: of one strategy.
        log: the processes' output.
        killed: whether the last task kills them.

    Raises:
        RuntimeError: if they end otherwise, with the end of their output.
    """
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    ranks = ranks_of(tasks[0]["strategy"])
    fork = multiprocessing.get_context("fork")
    processes = [
        fork.Process(target=_rank, args=(tasks, rank, ranks, port, log.with_suffix(f".{rank}.log")))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
        # A group of their own, to be ended together.
        os.setpgid(cast(int, process.pid), cast(int, processes[0].pid))
    expected = -signal.SIGKILL if killed else 0
    end = time.monotonic() + LIMIT_SECONDS
    try:
        # A rank whose peer has failed would wait for it.
        while any(p.exitcode is None for p in processes) and all(
            p.exitcode in (None, expected) for p in processes
        ):
            if time.monotonic() > end:
                raise RuntimeError(f"the ranks of {tasks[0]['strategy']} take more than {LIMIT_SECONDS:g} s")
            time.sleep(0.05)
    finally:
        for process in processes:
            if process.exitcode is None:
                process.kill()
            process.join()
    codes = [process.exitcode for process in processes]
    if codes != [expected] * ranks:
        said = "".join(path.read_text()[-3000:] for path in sorted(log.parent.glob(f"{log.stem}.*.log")))
        raise RuntimeError(f"the ranks ended with {codes}:\n{said}")


def _rank(tasks: list[dict[str, Any]], rank: int, ranks: int, port: int, log: Path) -> None:
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if ranks > 1:
        os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for task in tasks:
        run(task)


def prepare() -> None:
    """Imports for the forks, on the CPU alone, and unsets a launcher's variables."""
    for variable in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PL_GLOBAL_SEED"):
        os.environ.pop(variable, None)
    os.environ |= {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    torch.set_num_threads(1)
    importlib.import_module("deepspeed")


def measure(name: str, folder: Path, base: Path) -> list[dict[str, Any]]:
    """All stages under one strategy, one case each."""
    tasks = [{"strategy": name, "folder": str(folder), "base": str(base), "stage": kind} for kind in STAGES]
    log = folder / f"{name}.log"
    first, *others = tasks
    launch([*({**task, "mode": "whole"} for task in tasks), {**first, "mode": "killed"}], log, killed=True)
    for before, after in zip(tasks, others, strict=False):
        launch([{**before, "mode": "resumed"}, {**after, "mode": "killed"}], log, killed=True)
    launch([{**tasks[-1], "mode": "resumed"}], log, killed=False)
    return [_case(name, kind, folder) for kind in STAGES]


def measured(names: Sequence[str], folder: Path) -> Iterator[dict[str, Any]]:
    """The cases of some strategies that run at the same time.

    Args:
        names: of the strategies.
        folder: with the base; runs write into it.

    Raises:
        RuntimeError: if one of them fails.
    """
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=_measure_all, args=(name, folder)) for name in names]
    for process in processes:
        process.start()
    for name, process in zip(names, processes, strict=True):
        process.join()
        if process.exitcode:
            for other in processes:
                other.terminate()
            raise RuntimeError(f"{name} failed; its output is above")
        yield from json.loads((folder / f"{name}.cases.json").read_text(encoding="utf-8"))


def _measure_all(name: str, folder: Path) -> None:
    cases = measure(name, folder, folder / "base")
    (folder / f"{name}.cases.json").write_text(json.dumps(cases), encoding="utf-8")


def _case(name: str, kind: str, folder: Path) -> dict[str, Any]:
    stem = kind.replace(" ", "-")

    def read(which: str, mode: str) -> list[dict[str, Any]]:
        paths = sorted(folder.glob(f"{which}-{stem}-{mode}.*.json"))
        return [json.loads(path.read_text(encoding="utf-8")) for path in paths]

    whole, resumed, single = read(name, "whole"), read(name, "resumed"), read("single", "whole")[0]
    losses = [abs(a - b) for a, b in zip(whole[0]["losses"], single["losses"], strict=True)]
    again = [abs(a - b) for a, b in zip(resumed[0]["losses"], whole[0]["losses"][SAVED:], strict=True)]
    return {
        "strategy": name,
        "ranks": len(whole),
        "stage": kind,
        "seed": 0,
        "losses": whole[0]["losses"],
        "largest_loss_difference": max(losses),
        "largest_weight_difference": _difference(whole[0]["adapters"], single["adapters"]),
        "resumed_loss_difference": max(again),
        "resumed_weight_difference": _difference(resumed[0]["adapters"], whole[0]["adapters"]),
        **{
            key: [rank[key] for rank in whole]
            for key in (
                "held_bytes",
                "frozen_bytes_behind_backward",
                "gathered_bytes",
                "passes",
                "peak_above_start_bytes",
            )
        },
        **{key: whole[0][key] for key in ("adapter_checkpoint_bytes", "resume_checkpoint_bytes")},
    }


def _difference(one: str, other: str) -> float:
    """The largest difference of two adapter checkpoints' numbers."""
    largest = 0.0
    for path in sorted(Path(one).glob("*.safetensors")):
        ours, theirs = load_file(path), load_file(Path(other) / path.name)
        if set(ours) != set(theirs):
            raise ValueError(f"{path} and {Path(other) / path.name} hold different tensors")
        largest = max(largest, *(float((ours[key] - theirs[key]).abs().max()) for key in ours))
    return largest


def main(argv: Sequence[str] | None = None) -> int:
    """Measures everything and writes the figures.

    Args:
        argv: arguments; default: those of the process.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale_runs", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the figures go")
    parser.add_argument("--together", action="store_true", help="strategies side by side, on many cores")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    prepare()
    options.json.parent.mkdir(parents=True, exist_ok=True)
    typed = "python -m benchmarks.scale_runs" + " --together" * options.together
    recorder = Recorder(options.json, typed)
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        write_base(folder / "base")
        first, *others = RUNS
        # The single process records the rollouts of the others.
        for names in [[first], others] if options.together else [[name] for name in RUNS]:
            for case in measured(names, folder):
                recorder.add(case)
                logger.info(
                    "%-8s %-12s losses differ by %.1e, after a kill by %.1e",
                    case["strategy"],
                    case["stage"],
                    case["largest_loss_difference"],
                    case["resumed_loss_difference"],
                )
    recorder.finish(base=asdict(BASE), memory=asdict(WEAVER), frozen_type="float32")
    return 0


if __name__ == "__main__":
    sys.exit(main())
