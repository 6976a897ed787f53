"""Plays a cell of a study: read, act, reward, write, item by item, recorded and resumed.

A cell's folder holds `test/` and, under the frozen protocol, `learn/` before it: records as `memgen test` writes them, each
score with what the memory cost. Beside them lie `memory.sqlite` and, when the learning is done, `learned.json`.

An item is recorded when its memory is written. A process killed between the two has a memory that is one entry ahead of
the records, so a cell that goes on first makes the memory again, from its own log, as the last record has left it.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import random
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Final, Literal, final

from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader
from typing_extensions import override

import memgen
from memgen.analysis.ablation import swapped_latents
from memgen.analysis.playing import condition_batches
from memgen.analysis.subject import Subject
from memgen.data import EvalBatch, Item
from memgen.environments.base import Example
from memgen.environments.search.retrieval import Passage
from memgen.files import write_whole
from memgen.generation.rollout import Actor, rollout
from memgen.generation.scribe import ReasonerScribe
from memgen.memories.base import TextMemory, within
from memgen.memories.embedders import MiniLM
from memgen.memories.experience import Experience
from memgen.memories.scribe import HttpScribe, Scribe
from memgen.memories.store import rebuild
from memgen.model.latent_source import WeaverConfig
from memgen.model.memgen import MemGenConfig, MemGenModel
from memgen.model.trigger import TriggerConfig
from memgen.results.controls import bare_reasoner
from memgen.results.recorded_test import ItemRecorder, code_hash, run_settings
from memgen.results.score_files import Records, read_records
from memgen.results.summary import Row, summarise
from memgen.seeds import episode_seeds, seed_of
from memgen.study.reading import Words, at_random, read, said_in, solved, task_text, worked_examples
from memgen.study.settings import FOLDER, MEMORIES, Cell, StudySettings
from memgen.training.stage import build_model, require_context
from memgen.types import Trajectory

logger = logging.getLogger(__name__)

TEST: Final = "test"
LEARN: Final = "learn"
MEMORY_FILE, LEARNED = "memory.sqlite", "learned.json"
SAME = ("experiences", "learn_from", "budget", "k", "embedder", "known_words_only")
"""Settings of the study that decide what a memory holds and what of it is read."""
HEADING_TOKENS = 32
"""Room for the headings above passages."""


@dataclasses.dataclass
class _Costs:
    """What the memory has cost since it was opened."""

    retrievals: int
    scribe_calls: int
    scribe_tokens: int
    scribe_failures: int
    fallbacks: int

    def since(self, before: _Costs) -> dict[str, int]:
        return {name: value - getattr(before, name) for name, value in dataclasses.asdict(self).items()}


@final
class Session(LightningModule):
    """Plays one cell with `Trainer.predict`. Nothing is trained.

    Args:
        subject: the agent and the task, as the method's configuration has them. `out` is the cell's folder.
        settings: of the study.
        cell: which of its cells.
    """

    def __init__(self, subject: Subject, settings: StudySettings, cell: Cell) -> None:
        super().__init__()
        assert subject.out is not None, "a cell has a folder"
        self.subject = subject
        self.settings = settings
        self.cell = cell
        self.method = settings.methods[cell.method]
        self.data = subject.data
        self.generation = dataclasses.replace(subject.generation, group_size=1, seed=cell.seed)
        self.folder = subject.out
        self.memgen: MemGenModel
        self.memory: TextMemory[Any] | None = None
        self._phase: Literal["learn", "test"] = TEST
        self._records: Records | None = None
        self._recorder: ItemRecorder | None = None
        self._shots: list[Passage] = []
        self._learning: list[Item] = []

    def play(self, trainer: Trainer) -> list[Row]:
        """Plays what is left of the cell.

        Args:
            trainer: of one process.

        Returns:
            The scores of the test items.

        Raises:
            ValueError: if the folder was begun with other settings, or something does not fit into the context.
            ScribeError: if the scribe failed and is not to be replaced.
            OSError: if something cannot be written; what was recorded stays.
        """
        try:
            if self._to_learn and self.settings.learn_from == "attempts":
                self._phase = LEARN
                trainer.predict(self, return_predictions=False)
                self._conclude(self._costs())
            self._phase = TEST
            trainer.predict(self, return_predictions=False)
            assert self._records is not None, "the phase has begun"
            rows = [row for rows in self._records.done.values() for row in rows]
            self._records.write_summary(summarise(rows))
            return rows
        finally:
            self.close()

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
        self.words = Words(data.tokenizer_object, self.settings.known_words_only)
        if self._to_learn:
            data.setup("collect")
            self._learning = self._chosen(data.items["train"])
        if self._records is not None:
            self._records.close()
        # The memory first: a latent source that reads it wants its file.
        until = self._written_until()
        if not hasattr(self, "memgen"):
            self._open_memory(until)
            self._build()
        if self._phase == TEST and self._to_learn:
            self._learn_from_answers()
        self._open_records()

    def _build(self) -> None:
        config = self._config()
        init_from = self.subject.init_from
        self.config = config
        model = build_model(config, self.data, self.subject.resolve_asset, init_from)
        if not self.method.weaves:
            model = bare_reasoner(model)
        self.memgen = model.eval()
        new = self.generation.max_new_tokens
        reads = self.method.memory is not None and self.method.memory.into == "prompt"
        added = self.settings.budget + HEADING_TOKENS if reads or self._passages_alone else 0
        require_context(self.memgen, self.data, "test", new, passages=added)
        if self.memory is not None and self.memory.asks and self.settings.scribe.kind == "reasoner":
            self.memory.scribe = self._scribe()
        if self.method.examples:
            self._shots = self.words.shown(
                worked_examples(
                    self.data.environment,
                    self.method.examples,
                    self.cell.seed,
                    self.settings.budget,
                    self.words,
                )
            )

    @property
    def _passages_alone(self) -> bool:
        """Whether passages of no memory stand in the prompt."""
        return self.method.examples > 0 or self.method.control == "oracle"

    def _config(self) -> MemGenConfig:
        config = self.subject.memgen
        if self.method.control == "pause":
            ours = config.weaver
            weaver = WeaverConfig(
                kind="pause",
                prompt_latents=ours.prompt_latents,
                inference_latents=ours.inference_latents,
                arguments={"seed": self.cell.seed},
            )
            return dataclasses.replace(config, weaver=weaver, trigger=TriggerConfig(kind="always"))
        return (
            config if self.method.weaves else dataclasses.replace(config, trigger=TriggerConfig(kind="never"))
        )

    def _chosen(self, items: Sequence[Item]) -> list[Item]:
        """The training items that a memory learns from, in its order."""
        wanted = self.settings.experiences
        if len(items) < wanted:
            raise ValueError(
                f"{self.cell.task} has {len(items)} training items, but a memory is to learn from {wanted}: lower experiences"
            )
        return random.Random(seed_of("study", self.cell.task, self.cell.seed, LEARN)).sample(
            list(items), wanted
        )

    @property
    def items(self) -> list[Item]:
        """The items of the phase."""
        return self._learning if self._phase == LEARN else self.data.items[TEST]

    @property
    def _in_order(self) -> bool:
        """Whether an answer depends on the items before it."""
        return self.memory is not None or self.method.learns

    def order(self) -> list[int]:
        """Indices of the phase's items in the order in which they come."""
        order = list(range(len(self.items)))
        if self._in_order and self._phase == TEST:
            random.Random(seed_of("study", self.cell.task, self.cell.seed, TEST)).shuffle(order)
        return order

    # The memory

    def _written_until(self) -> int:
        """The last entry of the memory's log that belongs to what is recorded."""
        rows = _rows(self.folder / self._phase)
        if rows:
            return max(int(row["memory_entry"]) for row in rows)
        if self._phase == TEST and (self.folder / LEARNED).is_file():
            return int(json.loads((self.folder / LEARNED).read_text(encoding="utf-8"))["memory_entry"])
        return 0

    def _open_memory(self, until: int) -> None:
        chosen = self.method.memory
        if chosen is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / MEMORY_FILE
        kind = memory_class(chosen.method)
        arguments: dict[str, Any] = {
            "embedder": MiniLM() if self.settings.embedder == "minilm" else None,
            "on_scribe_failure": self.settings.scribe.on_failure,
            # A latent source opens the file with the seed that is the default.
            "seed": self.cell.seed if chosen.into == "prompt" else 0,
            "count_tokens": self.words.count,
        }
        if kind.asks and self.settings.scribe.kind == "http":
            arguments["scribe"] = self._scribe()
        memory = kind(path, constants_of(kind, chosen.constants), **arguments)
        if memory.store.entries != until:
            entries = memory.store.entries
            memory.close()
            if entries < until:
                raise ValueError(
                    f"{path} has {entries} entries, but its items were recorded up to entry {until}: it was changed since; "
                    f"remove {self.folder}, and the cell is played anew"
                )
            rebuild(path, path, until)
            memory = kind(path, constants_of(kind, chosen.constants), **arguments)
        self.memory = memory

    def _scribe(self) -> Scribe:
        chosen = self.settings.scribe
        if chosen.kind == "http":
            assert chosen.url is not None, "checked in its settings"
            assert chosen.model is not None, "likewise"
            return HttpScribe(
                chosen.url, chosen.model, chosen.key_variable, chosen.temperature, chosen.timeout_s
            )
        return ReasonerScribe(
            bare_reasoner(self.memgen),
            self.data.tokenizer_object,
            self.data.template,
            chosen.temperature,
            self.cell.seed,
        )

    def _costs(self) -> _Costs:
        memory = self.memory
        if memory is None:
            return _Costs(0, 0, 0, 0, 0)
        inside = sum(reader.retrievals for reader in _readers(self.memgen))
        usage = memory.usage
        return _Costs(
            retrievals=memory.retrievals + inside,
            scribe_calls=usage.calls,
            scribe_tokens=usage.prompt_tokens + usage.completion_tokens,
            scribe_failures=usage.failures,
            fallbacks=memory.fallbacks,
        )

    @property
    def _to_learn(self) -> bool:
        """Whether the memory has to learn from training items before the test."""
        frozen = self.cell.protocol == "frozen" and self.method.control != "empty"
        return frozen and not (self.folder / LEARNED).is_file()

    def _learn_from_answers(self) -> None:
        """Writes the reference solutions of the training items; what was interrupted begins anew."""
        assert self.memory is not None, "the frozen protocol is that of memories"
        before, clock = self._costs(), time.perf_counter()
        rng = random.Random(seed_of("shuffled outcomes", self.cell.seed))
        for item in self._learning:
            reward = 1.0 if self.method.control != "shuffled" else float(rng.random() < 0.5)
            messages = said_in(self.data.environment, item.example)
            self.memory.write(self._experience(item.example, messages, reward))
        self._conclude(before, clock)

    def _conclude(self, before: _Costs, clock: float | None = None) -> None:
        """Lets the memory learn what waits for the end, and closes the learning.

        Args:
            before: what the memory had cost before what is written about the learning.
            clock: since when; None: now.
        """
        assert self.memory is not None, "the frozen protocol is that of memories"
        clock = time.perf_counter() if clock is None else clock
        self.memory.finish()
        costs: dict[str, float] = {
            **self._costs().since(before),
            "memory_entry": self.memory.store.entries,
            "seconds": time.perf_counter() - clock,
        }
        write_whole(self.folder / LEARNED, json.dumps(costs) + "\n")

    # Playing

    def _open_records(self) -> None:
        settings = run_settings(
            self.memgen,
            self.config,
            self.generation,
            self.subject.episodes,
            self.data,
            TEST,
            str(self.trainer.precision),
            self.subject.environment,
        )
        study = self.settings
        settings["study"] = {
            "phase": self._phase,
            "cell": dataclasses.asdict(self.cell),
            "method": dataclasses.asdict(self.method),
            **{key: getattr(study, key) for key in SAME},
            "scribe": dataclasses.asdict(study.scribe),
        }
        # What the cell's own memory holds follows from its items.
        settings["agent"].pop("external", None)
        settings = anywhere(settings, self.folder)
        about = {"memgen": memgen.__version__, "code": code_hash(), "init_from": self.subject.init_from}
        self._records = Records(self.folder / self._phase, settings, about)
        if self._records.about.get("code") != code_hash():
            logger.warning("%s was begun with another version of memgen's code", self._records.folder)
        self._recorder = ItemRecorder(self._records, self.config.weaver)

    @override
    def predict_dataloader(self) -> DataLoader[tuple[str, EvalBatch]]:
        """Batches of what is not recorded yet; one item each where a memory learns in between."""
        assert self._records is not None, "set up before"
        left = [index for index in self.order() if index not in self._records.done]
        alone = self._in_order or self.method.control == "oracle"
        size = 1 if alone else self.data.batch_settings.val_batch_size
        return condition_batches(self.items, {self._phase: left}, size)

    @override
    def predict_step(self, batch: tuple[str, EvalBatch], batch_idx: int) -> int:
        """Reads, acts, is rewarded and writes; records it. Returns the number of items."""
        _, items = batch
        if not items.examples:
            return 0
        assert self._recorder is not None, "set up before"
        wall, cpu, before = time.perf_counter(), time.process_time(), self._costs()
        actor = self._actor(self._passages(items.examples[0]))
        seeds = episode_seeds(actor.generation.seed, items.indices)
        self._recorder.further = {**self._costs().since(before), **self._state()}
        swapped = self.method.control == "swapped"
        if self.memory is None and not swapped:
            # As `memgen test` plays, with whatever a latent source keeps of good episodes.
            self._recorder.play(actor, items, seeds)
            return len(items.examples)
        intervene = swapped_latents(actor, self.items, items) if swapped else None
        found = rollout(actor, items.examples, seeds, intervene=intervene)
        if self.memory is not None:
            if self._writes:
                self._write(self.memory, items.examples[0], found.trajectories[0])
            further = {**self._costs().since(before), **self._state()}
            self._recorder.further = {**further, "seconds": time.perf_counter() - wall}
        self._recorder.record(actor, items, seeds, found, time.process_time() - cpu)
        return len(items.examples)

    def _actor(self, passages: Sequence[Passage]) -> Actor:
        data = self.data
        return Actor(
            self.memgen,
            data.tokenizer_object,
            data.environment,
            self.generation,
            self.subject.episodes,
            data.template,
            passages=passages,
            place="examples" if self.memory is None else self.memory.place,
            headings=not self.settings.known_words_only,
        )

    def _passages(self, example: Example) -> list[Passage]:
        chosen, memory = self.method, self.memory
        if chosen.control == "oracle":
            own = solved(self.data.environment, example)
            return self.words.shown(within([own], self.settings.budget, self.words.count))
        if memory is None or chosen.memory is None or chosen.memory.into == "weaver":
            return self._shots
        found = read(memory, example, self.cell.task, self.settings.k, self.settings.budget)
        if chosen.control == "random":
            seed = seed_of("random passages", self.cell.seed, example.id)
            return at_random(memory, self.words.shown(found), seed, self.words)
        return self.words.shown(found)

    @property
    def _writes(self) -> bool:
        return self.method.control != "empty" and (self._phase == LEARN or self.cell.protocol == "online")

    def _write(self, memory: TextMemory[Any], example: Example, trajectory: Trajectory) -> None:
        """Nothing is learnt from an episode that the environment failed."""
        if trajectory.fault is not None:
            return
        reward = trajectory.reward
        if self.method.control == "shuffled":
            assert self._recorder is not None, "set up before"
            assert self._records is not None, "set up before"
            # By index: a cell that goes on has them in that order.
            played = [row for _, rows in sorted(self._records.done.items()) for row in rows]
            rewards = [row["reward"] for row in played if row["fault"] is None]
            rng = random.Random(seed_of("shuffled outcomes", self.cell.seed, example.id))
            reward = rng.choice([*rewards, reward])
        said = trajectory.messages()[len(trajectory.prompt) :]
        memory.write(self._experience(example, said, reward))

    def _experience(self, example: Example, said: Sequence[Any], reward: float) -> Experience:
        text = task_text(example)
        messages: Any = [{"role": "user", "content": text}, *said]
        return Experience(example.id, text, self.cell.task, messages, reward, None)

    def _state(self) -> dict[str, int]:
        if self.memory is None:
            return {"memory_entry": 0, "memory_bytes": 0}
        return {
            "memory_entry": self.memory.store.entries,
            "memory_bytes": (self.folder / MEMORY_FILE).stat().st_size,
        }

    def method_name(self) -> str:
        """The method's name, with `/df` if a deterministic fallback has written some of its memory."""
        memory = self.memory
        fell_back = memory is not None and (
            (memory.asks and memory.scribe is None)
            or any(row["fallbacks"] for phase in (LEARN, TEST) for row in _rows(self.folder / phase))
        )
        return f"{self.cell.method}/df" if fell_back else self.cell.method

    def trained_parameters(self) -> int:
        """Parameters that training has moved and that take part in answering."""
        if not self.method.weaves:
            return 0
        parts = [
            *self.memgen.weaver.own_parameters().values(),
            *self.memgen.trigger.own_parameters().values(),
        ]
        return sum(parameter.numel() for parameter in parts)

    def close(self) -> None:
        """Closes the files. It can be called twice."""
        if self._records is not None:
            self._records.close()
        if self.memory is not None:
            self.memory.close()


def anywhere(settings: Any, folder: Path) -> Any:
    """Settings as JSON values, in which it does not matter where a cell's folder lies."""
    text = json.dumps(settings)
    for path in (folder.absolute(), folder):
        text = text.replace(json.dumps(str(path))[1:-1], FOLDER)
    return json.loads(text)


def _readers(model: MemGenModel) -> list[TextMemory[Any]]:
    """The text memories that a latent source has opened: its own, and those of what it reads besides the stream."""
    parts = [model.weaver, *getattr(model.weaver, "external", ())]
    memories = [getattr(part, "memory", None) for part in parts]
    return [memory for memory in memories if isinstance(memory, TextMemory)]


def memory_class(name: str) -> type[TextMemory[Any]]:
    """A text memory's class by its name or import path.

    Raises:
        ValueError: if it cannot be imported, or is none.
    """
    module, _, class_name = MEMORIES.get(name, name).rpartition(".")
    try:
        found = getattr(import_module(module), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"memory.method {name!r} cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, TextMemory)):
        raise ValueError(f"memory.method {name!r} is no memgen.memories.base.TextMemory")  # noqa: TRY004 - a setting
    return found


def constants_of(kind: type[TextMemory[Any]], given: dict[str, Any]) -> Any:
    """A method's constants.

    Raises:
        ValueError: if it has no such constants, or a value is none of theirs.
    """
    try:
        return kind.constants(**given)
    except TypeError as error:
        known = ", ".join(field.name for field in dataclasses.fields(kind.constants))
        raise ValueError(
            f"memory.constants {given} do not fit {kind.method}, which has: {known or 'none'}"
        ) from error


def _rows(folder: Path) -> list[Row]:
    try:
        return list(read_records(folder).rows)
    except FileNotFoundError:
        return []
