"""The LightningDataModule of every stage."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from memgen.chat import CHATML, ChatTemplate, check_arguments, load_tokenizer, writes_todays_date
from memgen.data.batches import EvalBatch, Item
from memgen.data.items import MAX_LENGTH, ItemSettings, SplitReader, require_at_least
from memgen.data.order import EpochSampler, PromptSampler, ResumableLoader, WindowSampler
from memgen.data.replay import Replay
from memgen.data.rows import EvalDataset, PromptDataset, RowBuilder, TrainDataset
from memgen.data.workers import Loader
from memgen.environments.base import Environment, Split
from memgen.run_context import run_context

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BatchSettings:
    """How items become batches. The keys of `data` have these names."""

    batch_size: int = 8
    """Training items per rank and step, or per rank and rollout."""
    val_batch_size: int = 16
    """Items per rank and step in validation, test and predict."""
    keep_turn_latents: bool = False
    """Whether a conversation is one row with all its turns supervised, so that the latents of one turn stay for the next."""
    max_turns: int | None = None
    """Turns of a conversation that are learned from, sampled anew each epoch; None: all."""
    bucket: bool = False
    """Whether a training batch gathers items of similar length."""
    num_workers: int = 0
    """Processes that build batches."""
    seed: int = 0
    """Decides the order of the training items and the sampled turns."""

    def __post_init__(self) -> None:
        require_at_least(1, self, "batch_size", "val_batch_size", "max_turns")
        require_at_least(0, self, "num_workers", "seed")


@final
class EnvironmentData(LightningDataModule):
    """Batches of an environment's splits.

    Training yields `SFTBatch`, validation `EvalBatch` with the reference completions, test and predict `EvalBatch`
    without. With `learn_from: rollouts`, training yields `PromptBatch`, and no reference completion is needed. In
    evaluation rank r takes every world_size-th item from the r-th on, none twice; its last batch may be empty.
    """

    def __init__(
        self,
        environment: Environment,
        path: str | None = None,
        tokenizer: str = "lab:reasoner",
        chat_template: Literal["tokenizer", "chatml"] = "tokenizer",
        template_arguments: dict[str, Any] | None = None,
        learn_from: Literal["answers", "rollouts"] = "answers",
        trajectories: str | None = None,
        replay: Replay | None = None,
        batch_size: int = 8,
        val_batch_size: int = 16,
        max_length: int = MAX_LENGTH,
        max_prompt_length: int | None = None,
        train_examples: int | None = None,
        val_examples: int | None = None,
        test_examples: int | None = None,
        keep_turn_latents: bool = False,
        max_turns: int | None = None,
        bucket: bool = False,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        """Reads nothing yet.

        Args:
            environment: the task.
            path: where the data is. Configurations let the environment's own `path` refer to it
                (`path: ${data.path}`), so that `--data.path DIR` suffices; here it is only reported.
            tokenizer: a directory, a name of the hub, or an asset's name for `resolve_asset`.
            chat_template: "tokenizer": the tokenizer's template if it has one, else ChatML; "chatml": ChatML.
            template_arguments: values for the chat template's variables in every prompt and conversation, such as
                `enable_thinking: false`; `strftime_now: "2026-01-31"` is what a template takes for today's date.
            learn_from: "answers": the reference completions; "rollouts": what the agent itself does.
            trajectories: a file of `memgen collect`: its conversations are learned from in place of the training
                split's reference completions. Validation and test stay the environment's.
            replay: training items of earlier tasks in every batch; None: none.
            batch_size: training items per rank and step, or per rank and rollout.
            val_batch_size: items per rank and step in validation, test and predict.
            max_length: tokens a conversation may have, latents not counted; longer ones are dropped and counted.
            max_prompt_length: tokens a prompt may have; None: `max_length`.
            train_examples: uses only the first so many items of the split, counted before any is dropped.
            val_examples: likewise.
            test_examples: likewise.
            keep_turn_latents: a conversation is one row with all its turns supervised, so that the latents of one
                turn stay in the stream for the next; False: one row per turn.
            max_turns: learns from at most so many turns of a conversation, sampled anew each epoch; None: from all.
            bucket: whether a training batch gathers items of similar length.
            num_workers: processes that build batches.
            seed: decides the order of the training items and the sampled turns.

        Raises:
            ValueError: if a number is out of its range.
        """
        super().__init__()
        if trajectories is not None and learn_from == "rollouts":
            raise ValueError(
                f"data.trajectories is {trajectories}, but data.learn_from is rollouts, which learns from none; leave "
                "one of them out"
            )
        if replay is not None:
            if learn_from == "rollouts":
                raise ValueError(
                    "data.replay is for data.learn_from answers, not rollouts; set one of them otherwise"
                )
            replay.of_batch(batch_size)
        self.environment = environment
        self.replay = replay
        self.path = path
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.template = ChatTemplate(CHATML if chat_template == "chatml" else None, template_arguments or {})
        """The chat template to give to `memgen.chat`."""
        self.learn_from = learn_from
        self.item_settings = ItemSettings(
            trajectories=trajectories,
            max_length=max_length,
            max_prompt_length=max_prompt_length,
            train_examples=train_examples,
            val_examples=val_examples,
            test_examples=test_examples,
        )
        self.batch_settings = BatchSettings(
            batch_size=batch_size,
            val_batch_size=val_batch_size,
            keep_turn_latents=keep_turn_latents,
            max_turns=max_turns,
            bucket=bucket,
            num_workers=num_workers,
            seed=seed,
        )
        self.items: dict[Split, list[Item]] = {}
        """Tokenised items of each split that was set up, without the dropped ones."""
        self.replayed: list[Item] = []
        """Tokenised items of earlier tasks."""
        self.dropped: dict[Split, int] = {}
        """Items of each split that were too long."""
        self._tokenizer: PreTrainedTokenizerBase | None = None

    def resolve_asset(self, name: str) -> str:
        """The directory of an asset, by the Trainer's `RunContext`; other names pass through."""
        return run_context(self.trainer).resolve_asset(name)

    @property
    def tokenizer_object(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded on first use."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.resolve_asset(self.tokenizer))
        return self._tokenizer

    @property
    def steps_per_rollout(self) -> int:
        """Training steps that one rollout serves, as the stage in training says."""
        assert self.trainer is not None, "a stage trains with a Trainer"
        stage: Any = self.trainer.lightning_module
        return int(stage.steps_per_rollout)

    def prepare_data(self) -> None:
        """Fetches or builds the tokenizer once per machine."""
        self.resolve_asset(self.tokenizer)

    def setup(self, stage: str) -> None:
        """Tokenises the splits of a stage (fit, validate, test, predict; collect: the training split alone).

        Raises:
            FileNotFoundError: if the data or the tokenizer is absent.
            ValueError: if the data is broken, an item has an empty prompt or completion, or no item is short enough.
        """
        splits: tuple[Split, ...]
        match stage:
            case "fit":
                splits = ("train", "val")
            case "validate":
                splits = ("val",)
            case "test" | "predict":
                splits = ("test",)
            case "collect":
                splits = ("train",)
            case _:
                raise ValueError(f"stage must be fit, validate, test, predict or collect, got {stage!r}")
        check_arguments(self.tokenizer_object, self.template)
        if self._rank == 0:
            self._report_template()
        reader = SplitReader(
            environment=self.environment,
            path=self.path,
            tokenizer=self.tokenizer_object,
            template=self.template,
            settings=self.item_settings,
            with_answers=self.learn_from == "answers",
            report=self._rank == 0,
        )
        for split in splits:
            if split not in self.items:
                self.items[split], self.dropped[split] = reader.read(split)
        if stage == "fit" and self.replay is not None and not self.replayed:
            kept = dataclasses.replace(
                self.item_settings, trajectories=None, train_examples=self.replay.items
            )
            for earlier in self.replay.environments:
                again = dataclasses.replace(reader, environment=earlier, path=None, settings=kept)
                self.replayed += again.read("train")[0]

    def _report_template(self) -> None:
        if writes_todays_date(self.tokenizer_object, self.template):
            log.warning(
                "the chat template of %s writes today's date into every prompt, so a run that is resumed tomorrow has other "
                'prompts; set data.template_arguments.strftime_now to a date such as "2026-01-31"',
                self.tokenizer,
            )

    def train_dataloader(self) -> ResumableLoader:
        """Micro-batches of this rank, `SFTBatch` or `PromptBatch`."""
        if self.learn_from == "rollouts":
            dataset: Dataset[Any] = PromptDataset(self.items["train"])
        else:
            dataset = TrainDataset(self._train_rows())
        return ResumableLoader(dataset, self._sampler(), self.batch_settings.num_workers)

    def optimizer_steps(self) -> int:
        """Optimizer steps of the whole run, over all its epochs.

        For schedules: reading `trainer.estimated_stepping_batches` instead makes the Trainer set up its loaders before
        it restores a checkpoint, and then drop the place within the epoch that the checkpoint holds.

        Raises:
            ValueError: if the run has no end.
        """
        trainer = self.trainer
        assert trainer is not None, "a schedule belongs to a run"
        if trainer.max_epochs in (None, -1):
            if trainer.max_steps == -1:
                raise ValueError("a run needs an end: set trainer.max_steps or trainer.max_epochs")
            return trainer.max_steps
        steps = self._sampler().windows * int(trainer.max_epochs or 0)
        return steps if trainer.max_steps == -1 else min(steps, trainer.max_steps)

    def _sampler(self) -> EpochSampler:
        trainer = self.trainer
        if self.learn_from == "rollouts":
            return PromptSampler(
                items=len(self.items["train"]),
                batch_size=self.batch_settings.batch_size,
                steps_per_rollout=self.steps_per_rollout,
                rank=self._rank,
                world_size=self._world_size,
                accumulate=1 if trainer is None else trainer.accumulate_grad_batches,
                limit=1.0 if trainer is None else trainer.limit_train_batches,
                seed=self.batch_settings.seed,
            )
        build = self._train_rows()
        return WindowSampler(
            lengths=[len(conversation.ids) for conversation in build.conversations],
            targets=build.targets,
            batch_size=self.batch_settings.batch_size,
            rank=self._rank,
            world_size=self._world_size,
            accumulate=1 if trainer is None else trainer.accumulate_grad_batches,
            limit=1.0 if trainer is None else trainer.limit_train_batches,
            seed=self.batch_settings.seed,
            bucket=self.batch_settings.bucket,
            whole_windows=trainer is not None and trainer.strategy.handles_gradient_accumulation,
            replayed=len(self.replayed),
            replay=0 if self.replay is None else self.replay.of_batch(self.batch_settings.batch_size),
        )

    def val_dataloader(self) -> DataLoader[EvalBatch]:
        """Items of this rank with their reference completions, `EvalBatch`."""
        items = self.items["val"]
        rows = None if self.learn_from == "rollouts" else self._rows(items, max_turns=None)
        return self._eval_loader(items, rows)

    def test_dataloader(self) -> DataLoader[EvalBatch]:
        """Items of this rank, `EvalBatch`."""
        return self._eval_loader(self.items["test"], None)

    def predict_dataloader(self) -> DataLoader[EvalBatch]:
        """The same as `test_dataloader`."""
        return self.test_dataloader()

    @property
    def _rank(self) -> int:
        return 0 if self.trainer is None else self.trainer.global_rank

    @property
    def _world_size(self) -> int:
        return 1 if self.trainer is None else self.trainer.world_size

    def _train_rows(self) -> RowBuilder:
        return self._rows([*self.items["train"], *self.replayed], self.batch_settings.max_turns)

    def _rows(self, items: Sequence[Item], max_turns: int | None) -> RowBuilder:
        return RowBuilder(
            [item.conversation for item in items if item.conversation is not None],
            keep_turn_latents=self.batch_settings.keep_turn_latents,
            max_turns=max_turns,
            seed=self.batch_settings.seed,
        )

    def _eval_loader(self, items: Sequence[Item], build: RowBuilder | None) -> DataLoader[EvalBatch]:
        mine = range(self._rank, len(items), self._world_size)
        # Every rank has as many batches as the first, the last of them perhaps empty: ranks meet at an evaluation's end.
        most = -(-len(items) // self._world_size)
        batches = [
            tuple(mine[first : first + self.batch_settings.val_batch_size])
            for first in range(0, most, self.batch_settings.val_batch_size)
        ]
        # A list of index tuples as the sampler: a sampler that the Trainer puts in its place is noticed.
        return Loader(
            EvalDataset(items, build),
            batch_size=None,
            sampler=batches,
            num_workers=self.batch_settings.num_workers,
        )
