"""The ablation matrix: the test items answered under conditions that differ in one thing, item by item and resumed.

All conditions have the checkpoint's weaver, the same template, limits, sampling and seeds. A condition that samples at
another temperature (`bon`) or adds a text to the prompt (`cot`) has that in the settings of its records.

Differs from the paper's trigger ablation (Table 6): its random positions are any tokens, ours are boundaries; ours has
the reasoner alone, swapped latents, uncertainty and best-of-n beside them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, final, get_args

from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader
from typing_extensions import override

import memgen
from memgen.analysis.condition_names import COT_TEXT, DEFAULT, NAMES, OPTIONAL, VALUED, Kind
from memgen.analysis.playing import condition_batches
from memgen.analysis.subject import Subject
from memgen.chat import prompt_ids
from memgen.data import EvalBatch, Item
from memgen.files import current
from memgen.generation.decode import Intervention
from memgen.generation.rollout import Actor, rollout
from memgen.generation.sampling import GenerationSettings
from memgen.model.latent_source import LatentSource, Surroundings, WeaverConfig, build_source
from memgen.model.memgen import MemGenConfig, MemGenModel
from memgen.model.trigger import TriggerConfig, build_trigger
from memgen.results.controls import (
    always_invoking,
    bare_reasoner,
    deciding_by,
    invoking_inside,
    writing_by,
)
from memgen.results.recorded_test import ItemRecorder, code_hash, run_settings
from memgen.results.score_files import Records
from memgen.seeds import episode_seeds
from memgen.training.checkpoint import TRIGGER_FILE, load_checkpoint, read_config
from memgen.training.stage import build_model, require_context

logger = logging.getLogger(__name__)

FOLDER = "ablations"
"""Folder of ablations below the folder of runs."""
CONDITIONS = "conditions"
"""Folder of an ablation for the records of its conditions, each as `memgen test` writes them."""
FEWEST_ITEMS = 2
"""A pair of items is the least that an interval, a test or a swap can be made of."""
ENTROPY_TRIGGER = "memgen.model.entropy_trigger.EntropyTrigger"


@dataclass(frozen=True)
class Condition:
    """A way of answering the test items.

    Attributes:
        kind: what differs.
        value: of `random` the probability of INVOKE, of `entropy` the threshold in nats, of `bon` the number of answers.
        directory: of `pause`, a checkpoint of learned pause tokens; None: new ones, which nobody trained.
    """

    kind: Kind
    value: float | None = None
    directory: str | None = None

    @classmethod
    def parse(cls, text: str) -> Condition:
        """Reads a condition as it is written: `always`, `random:0.5`.

        Raises:
            ValueError: if there is no such condition, or its value is none of its values.
        """
        kind, colon, value = text.strip().partition(":")
        if kind not in get_args(Kind):
            raise ValueError(f"unknown condition {text.strip()!r}; there are {', '.join(NAMES)}")
        if kind in OPTIONAL:
            return cls(cast(Kind, kind), directory=value or None)
        if bool(colon) != (kind in VALUED):
            wanted = f"{kind}:{VALUED[kind]}" if kind in VALUED else kind
            raise ValueError(f"condition {text.strip()!r}: write {wanted}")
        return cls(cast(Kind, kind), _number(text.strip(), value) if colon else None)

    def __post_init__(self) -> None:
        value = self.value
        if self.kind == "random" and not (value is not None and 0.0 <= value <= 1.0):
            raise ValueError(f"random:P needs a probability from 0 to 1, got {value:g}")
        if self.kind == "entropy" and not (value is not None and value >= 0.0):
            raise ValueError(f"entropy:T needs a threshold of 0 nats or more, got {value:g}")
        if self.kind == "bon" and not (value is not None and value >= 2 and value == int(value)):
            raise ValueError(f"bon:N needs a whole number of answers, at least 2, got {value:g}")

    @property
    def name(self) -> str:
        """As it is written."""
        if self.directory is not None:
            return f"{self.kind}:{self.directory}"
        return self.kind if self.value is None else f"{self.kind}:{self.value:g}"

    @property
    def folder_name(self) -> str:
        """A folder's name that other conditions do not have."""
        if self.directory is not None:
            return f"{self.kind}-{hashlib.sha256(self.directory.encode()).hexdigest()[:8]}"
        return self.name.replace(":", "_")

    @property
    def samples(self) -> int:
        """Answers per item."""
        return int(self.value) if self.kind == "bon" and self.value is not None else 1

    @property
    def memory(self) -> bool:
        """Whether it is memory as it is meant to be used: what best-of-n is given the positions of."""
        return self.kind in ("trained", "always")

    def trigger(self, trained: TriggerConfig) -> TriggerConfig:
        """The trigger that decides, as a configuration.

        Args:
            trained: the checkpoint's.
        """
        match self.kind:
            case "trained":
                return trained
            case "random":
                assert self.value is not None, "checked when it was made"
                return TriggerConfig(kind="random", probability=self.value)
            case "entropy":
                return TriggerConfig(kind=ENTROPY_TRIGGER, arguments={"threshold": self.value})
            case "vanilla" | "never" | "bon" | "cot":
                return TriggerConfig(kind="never")
            case _:
                return TriggerConfig(kind="always")

    def agent(
        self, model: MemGenModel, trigger: TriggerConfig, pause: LatentSource | None = None
    ) -> MemGenModel:
        """The model as it answers under this condition, on the same weights.

        Args:
            model: with the checkpoint's trigger, if it is trained.
            trigger: what `trigger` gave.
            pause: pause tokens, for `pause`.
        """
        match self.kind:
            case "vanilla" | "bon" | "cot":
                return bare_reasoner(model)
            case "trained":
                return model
            case "prompt_only":
                return always_invoking(model, insertions=0)
            case "delimiters":
                return invoking_inside(model)
            case "pause":
                assert pause is not None, "the caller makes them"
                return writing_by(model, pause)
            case _:
                base = model.reasoner.backbone
                return deciding_by(model, build_trigger(trigger, base, base.hidden_size))


def _number(text: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"condition {text!r}: {value!r} is no number") from None


@dataclass(frozen=True)
class AblationSettings:
    """What is compared, beyond the checkpoint and the items."""

    conditions: tuple[Condition, ...] | None = None
    """In the order of the table; the others are compared with the first. None: `DEFAULT`, and `trained` where the
    checkpoint holds a trained trigger."""
    cot_text: str = COT_TEXT
    """What `cot` adds to the prompt, on a line of its own."""
    bon_temperature: float | None = None
    """Temperature of the answers of `bon`; None: that of all conditions."""

    def __post_init__(self) -> None:
        names = [condition.name for condition in self.conditions or ()]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"condition {repeated[0]} is given twice")
        if self.conditions is not None and not names:
            raise ValueError(f"there is no condition to play; there are {', '.join(NAMES)}")
        if not self.cot_text.strip():
            raise ValueError("the text of cot is empty; leave cot out of the conditions instead")


@final
class Ablation(LightningModule):
    """Plays the test items under every condition with `Trainer.predict`. Nothing is trained.

    Args:
        subject: a checkpoint. Its trigger is not read: each condition names its own; `group_size` is set to 1, and to n for
            best-of-n. Records go to `<root>/ablations/<environment>-<hash of the settings and the code>`, unless it names a
            folder.
        settings: what is compared.
    """

    def __init__(self, subject: Subject, settings: AblationSettings) -> None:
        super().__init__()
        assert subject.init_from is not None, "an ablation is of a checkpoint"
        self.config = subject.memgen
        self.data = subject.data
        self.generation = dataclasses.replace(subject.generation, group_size=1)
        self.episodes = subject.episodes
        self.init_from = subject.init_from
        self.environment = subject.environment
        self.resolve_asset = subject.resolve_asset
        self.root = subject.root
        self.settings = settings
        self.out = subject.out
        self.memgen: MemGenModel
        self.sources = nn.ModuleList()
        """Pause tokens, a part of this module so that they are moved where the model is."""
        self.folder: Path
        """Where everything is written; known once the model is built."""
        self.conditions: tuple[Condition, ...]
        """In the order of the table; known then too."""
        self._actors: dict[str, Actor] = {}
        self._recorders: dict[str, ItemRecorder] = {}

    # Set-up

    @override
    def prepare_data(self) -> None:
        # Through its Trainer the data finds assets.
        self.data.trainer = self.trainer
        self.data.prepare_data()

    @override
    def setup(self, stage: str) -> None:
        data = self.data
        # Items and prompts, no reference completions.
        data.learn_from = "rollouts"
        data.trainer = self.trainer
        data.setup("test")
        if len(self.items) < FEWEST_ITEMS:
            raise ValueError(
                f"the test split has {len(self.items)} items, but a comparison needs at least {FEWEST_ITEMS} "
                "(data.test_examples)"
            )
        trained = self._trained_trigger()
        self.conditions = self._chosen(trained)
        self._require_temperature()
        asked = any(condition.kind == "trained" for condition in self.conditions)
        config = dataclasses.replace(
            self.config, trigger=trained if asked and trained is not None else TriggerConfig(kind="always")
        )
        model = build_model(config, data, self.resolve_asset, self.init_from)
        require_context(model, data, "test", self.generation.max_new_tokens)
        self.memgen = model
        self._require_insertions()
        self.folder = self.out or self.root / FOLDER / self._name(model)
        for condition in self.conditions:
            self._open(condition, trained)

    def _trained_trigger(self) -> TriggerConfig | None:
        """The checkpoint's trigger, if it was trained."""
        directory = Path(self.resolve_asset(self.init_from))
        holds = (current(directory) / TRIGGER_FILE).exists()
        return read_config(directory).trigger if holds else None

    def _chosen(self, trained: TriggerConfig | None) -> tuple[Condition, ...]:
        chosen = self.settings.conditions
        if chosen is None:
            added = () if trained is None else ("trained",)
            return tuple(Condition.parse(name) for name in (*DEFAULT, *added))
        if trained is None and any(condition.kind == "trained" for condition in chosen):
            raise ValueError(
                f"{self.init_from} holds no trained trigger, so there is nothing to play under the condition trained: leave "
                "it out, or train one (memgen fit --config conf/trigger_rl.yaml --checkpoint DIR)"
            )
        return chosen

    def _require_temperature(self) -> None:
        several = [condition.name for condition in self.conditions if condition.samples > 1]
        if several and self._temperature(answers=2) == 0:
            raise ValueError(
                f"{several[0]} samples several answers to each item, but the temperature is 0, so all of them would be equal; "
                "set --bon-temperature above 0, or model.generation.temperature"
            )

    def _require_insertions(self) -> None:
        weaver, cap = self.memgen.weaver.config, self.memgen.boundaries.config.max_inference_insertions
        inside = weaver.inference_latents and cap
        for condition in self.conditions:
            if condition.kind == "prompt_only" and not weaver.prompt_latents:
                raise ValueError(
                    "prompt_only would insert nothing: model.memgen.weaver.prompt_latents is 0; leave it out of the conditions"
                )
            if condition.kind == "delimiters" and not inside:
                raise ValueError(
                    "delimiters would insert nothing: model.memgen.weaver.inference_latents is "
                    f"{weaver.inference_latents} and boundaries.max_inference_insertions {cap}; leave it out of the conditions"
                )

    def _name(self, model: MemGenModel) -> str:
        always = dataclasses.replace(self.config, trigger=TriggerConfig(kind="always"))
        settings = self._run_settings(always_invoking(model), always, self.generation)
        text = json.dumps([settings, code_hash()], sort_keys=True)
        return f"{self.data.environment.name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    def _run_settings(
        self, model: MemGenModel, config: MemGenConfig, generation: GenerationSettings
    ) -> dict[str, Any]:
        return run_settings(
            model,
            config,
            generation,
            self.episodes,
            self.data,
            "test",
            str(self.trainer.precision),
            self.environment,
        )

    def _open(self, condition: Condition, trained: TriggerConfig | None) -> None:
        """Builds the actor of a condition and opens its records."""
        data = self.data
        trigger = condition.trigger(trained or TriggerConfig(kind="never"))
        generation = dataclasses.replace(
            self.generation,
            group_size=condition.samples,
            temperature=self._temperature(condition.samples),
        )
        config = dataclasses.replace(self.config, trigger=trigger)
        pause = None
        if condition.kind == "pause":
            pause, config = self._pause(condition, config)
        actor = Actor(
            condition.agent(self.memgen, trigger, pause),
            data.tokenizer_object,
            data.environment,
            generation,
            self.episodes,
            data.template,
            self.settings.cot_text if condition.kind == "cot" else "",
        )
        self._require_known(condition, actor)
        settings = {
            **self._run_settings(actor.model, config, generation),
            "condition": {"name": condition.name, "instruction": actor.instruction},
        }
        about = {"memgen": memgen.__version__, "code": code_hash(), "init_from": self.init_from}
        records = Records(self.folder / CONDITIONS / condition.folder_name, settings, about)
        if records.about.get("code") != code_hash():
            logger.warning("%s was begun with another version of memgen's code", records.folder)
        self._actors[condition.name] = actor
        self._recorders[condition.name] = ItemRecorder(records, self.config.weaver)

    def _pause(self, condition: Condition, config: MemGenConfig) -> tuple[LatentSource, MemGenConfig]:
        """Pause tokens of the checkpoint's K, new or from a checkpoint of their own, and the model's configuration with them."""
        model, ours = self.memgen, self.config.weaver
        found = None if condition.directory is None else Path(self.resolve_asset(condition.directory))
        weaver = WeaverConfig(
            kind="pause", prompt_latents=ours.prompt_latents, inference_latents=ours.inference_latents
        )
        if found is not None:
            weaver = read_config(found).weaver
            if weaver.kind != "pause":
                raise ValueError(
                    f"{condition.name} is no checkpoint of pause tokens: its model.memgen.weaver.kind is {weaver.kind}; train "
                    "some with --config conf/baselines/pause.yaml, or write pause for new ones"
                )
            sizes = [(w.prompt_latents, w.inference_latents) for w in (weaver, ours)]
            if sizes[0] != sizes[1]:
                raise ValueError(
                    f"{condition.name} inserts {sizes[0][0]} latents at the end of a prompt and {sizes[0][1]} at a delimiter, "
                    f"{self.init_from} {sizes[1][0]} and {sizes[1][1]}; train pause tokens with the same numbers"
                )
        config = dataclasses.replace(config, weaver=weaver)
        base = model.reasoner.backbone
        tokenizer = self.data.tokenizer_object
        source = build_source(weaver, Surroundings(base, base, tokenizer, tokenizer))
        if found is not None:
            holder = writing_by(model, source)
            holder.config, holder.tokenizer = config, model.tokenizer
            load_checkpoint(holder, found)
        self.sources.append(source)
        return source, config

    def _temperature(self, answers: int) -> float:
        chosen = self.settings.bon_temperature
        return self.generation.temperature if answers == 1 or chosen is None else chosen

    def _require_known(self, condition: Condition, actor: Actor) -> None:
        """Refuses an instruction that the tokenizer cannot encode, before anything is played."""
        if not actor.instruction:
            return
        messages = actor.instructed(self.data.environment.messages(self.items[0].example))
        try:
            prompt_ids(actor.tokenizer, messages, actor.template)
        except ValueError as error:
            raise ValueError(
                f"{condition.name}: the prompt with the text {actor.instruction!r} cannot be encoded ({error}); choose another "
                "one with --cot-text"
            ) from error

    @property
    def items(self) -> list[Item]:
        """The test items."""
        return self.data.items["test"]

    @override
    def predict_dataloader(self) -> DataLoader[tuple[str, EvalBatch]]:
        """Batches of what is not recorded yet, condition by condition."""
        left = {
            name: [index for index in range(len(self.items)) if index not in recorder.records.done]
            for name, recorder in self._recorders.items()
        }
        return condition_batches(self.items, left, self.data.batch_settings.val_batch_size)

    # Playing

    @override
    def predict_step(self, batch: tuple[str, EvalBatch], batch_idx: int) -> int:
        """Plays a batch and records it. Returns the number of items."""
        name, items = batch
        if not items.examples:
            return 0
        actor = self._actors[name]
        seeds = episode_seeds(actor.generation.seed, items.indices, actor.generation.group_size)
        intervene = swapped_latents(actor, self.items, items) if name == "swapped" else None
        clock = time.process_time()
        found = rollout(actor, items.examples, seeds, intervene=intervene)
        self._recorders[name].record(actor, items, seeds, found, time.process_time() - clock)
        return len(items.examples)

    @override
    def on_predict_end(self) -> None:
        self.close()

    def close(self) -> None:
        """Closes the files. It can be called twice."""
        for recorder in self._recorders.values():
            recorder.records.close()


def swapped_latents(actor: Actor, items: Sequence[Item], batch: EvalBatch) -> Intervention:
    """Gives each item of a batch the latents of its donor, insertion by insertion; the donors are answered for that.

    Args:
        actor: who answers.
        items: all items.
        batch: some of them.
    """
    donors = [donor(items, index) for index in batch.indices]
    seeds = episode_seeds(actor.generation.seed, donors)
    examples = [items[index].example for index in donors]
    blocks = rollout(actor, examples, seeds, keep_latents=True).latents
    assert blocks is not None, "they were asked for"

    def intervene(places: Sequence[int], numbers: Sequence[int], latents: list[Tensor]) -> list[Tensor]:
        return [
            swapped_block(blocks[place], number, block)
            for place, number, block in zip(places, numbers, latents, strict=True)
        ]

    return intervene


def donor(items: Sequence[Item], index: int) -> int:
    """The item whose latents an item is given: the next one of its task, around the end; of another task if it has none."""
    count = len(items)
    others = [(index + step) % count for step in range(1, count)]
    task = items[index].example.meta.get("task")
    return next((other for other in others if items[other].example.meta.get("task") == task), others[0])


def swapped_block(blocks: Sequence[Tensor], number: int, block: Tensor) -> Tensor:
    """The block of another item in the place of one's own.

    Args:
        blocks: all blocks of the other item, in order.
        number: of the block in its own episode.
        block: the own one, (K, H).

    Returns:
        The one with this number among those of as many latents, the last where there are fewer. Where there is none of
        as many, the last of any size without what exceeds K; an empty block if there is none at all. Never the own one.
    """
    alike = [other for other in blocks if len(other) == len(block)]
    if alike:
        return alike[min(number, len(alike) - 1)].to(block)
    return blocks[-1][: len(block)].to(block) if blocks else block[:0]
