"""The model card of an agent: what its checkpoint, its run and its recorded tests say, and nothing else.

A run's folder has its resolved configuration (`resume/config.yaml`; in MLflow `config/resolved.yaml`), `memgen test` writes
`runs/tests/*/`. A test counts if it played these weights, which its journal has the hash of.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from memgen.files import current
from memgen.model.latent_source import source_class
from memgen.model.memgen import MemGenConfig, MemGenModel

CARD = "README.md"
_CONFIGURATIONS = ("resume/config.yaml", "config/resolved.yaml")
_TESTS = "tests"
_ASSETS = {"lab:smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""Names on the hub of assets that are there."""
_LICENCES = {"lab:smollm2": "apache-2.0", "lab:reasoner": "apache-2.0"}
"""Licences of assets."""


@dataclass(frozen=True)
class Measured:
    """A recorded test of the agent.

    Attributes:
        environment: name of the task.
        split: train, val or test.
        items: how many were answered.
        temperature: of the answers.
        metrics: mean and ends of the 95 % bootstrap interval over items, by name; an end is None for a single item.
    """

    environment: str
    split: str
    items: int
    temperature: float
    metrics: Mapping[str, tuple[float, float | None, float | None]]


@dataclass(frozen=True)
class Card:
    """Contents of a model card.

    Attributes:
        config: of the model.
        kinds: kinds of insertion that were trained.
        run: the run's resolved configuration; empty: not known.
        tests: recorded tests of these weights.
        licence: identifier; None: not known.
    """

    config: MemGenConfig
    kinds: tuple[str, ...]
    run: Mapping[str, Any]
    tests: tuple[Measured, ...]
    licence: str | None

    @classmethod
    def of(
        cls, model: MemGenModel, config: MemGenConfig, source: Path | None, licence: str | None = None
    ) -> Card:
        """The card of an agent.

        Args:
            model: the agent's.
            config: its configuration, as it is published.
            source: the checkpoint's folder; its run is looked for around it. None: there is none.
            licence: of the weights; None: the base's, where it is known.
        """
        place = None if source is None else current(source).resolve()
        return cls(
            config=config,
            kinds=tuple(kind.name.lower() for kind in sorted(model.weaver.trained_kinds)),
            run={} if place is None else _run_of(place),
            tests=() if place is None else tuple(_tests_of(model, place)),
            licence=licence or _licence_of(config),
        )

    def text(self, name: str) -> str:
        """The card in Markdown, with the metadata that the hub reads.

        Args:
            name: of the agent; ORG/NAME if it is on the hub.
        """
        return f"---\n{self._metadata(name)}\n---\n\n{self._body(name)}"

    @property
    def base(self) -> str:
        """The reasoner's base, by its name on the hub where it has one."""
        name = self.config.backbone.name
        return _ASSETS.get(name.partition("?")[0], name)

    @property
    def task(self) -> str | None:
        """The environment that the agent was trained on."""
        chosen = _section(self.run, "data").get("environment")
        path = chosen.get("class_path") if isinstance(chosen, Mapping) else chosen
        return None if path is None else str(path).rpartition(".")[2]

    @property
    def stage(self) -> str | None:
        """The stage that trained it."""
        path = _section(self.run, "model").get("class_path")
        return None if path is None else str(path).split(".")[-2]

    def _metadata(self, name: str) -> str:
        from huggingface_hub import EvalResult, ModelCardData

        on_hub = self.base.count("/") == 1 and ":" not in self.base
        relation: dict[str, Any] = {"base_model_relation": "adapter"} if on_hub else {}
        data = ModelCardData(
            library_name="memgen",
            base_model=self.base if on_hub else None,
            license=self.licence,
            pipeline_tag="text-generation",
            tags=["memgen", "latent-memory", *([self.stage] if self.stage else [])],
            model_name=name if self.tests else None,
            eval_results=[
                EvalResult(
                    task_type="text-generation",
                    dataset_type=test.environment,
                    dataset_name=test.environment,
                    dataset_split=test.split,
                    metric_type=metric,
                    metric_value=round(mean, 6),
                )
                for test in self.tests
                for metric, (mean, _, _) in test.metrics.items()
            ]
            or None,
            **relation,
        )
        return str(data.to_yaml()).strip()

    def _body(self, name: str) -> str:
        weaver, where = self.config.weaver, f"hf://{name}" if "/" in name else name
        revision = f" (revision {self.config.backbone.revision})" if self.config.backbone.revision else ""
        kinds = ", ".join(
            f"{kind} (K = {weaver.prompt_latents if kind == 'prompt' else weaver.inference_latents})"
            for kind in self.kinds
        )
        facts = {
            "Base": f"`{self.base}`{revision}, frozen and not part of these files",
            **self._memory(kinds),
            "Stage": self.stage,
            "Task": self.task,
            "Data": self._data(),
            "Seed": self.run.get("seed_everything"),
            "Licence": self.licence or "not stated",
        }
        rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items() if value is not None)
        return (
            f"# {name}\n\n"
            f"{self._what()}\n\n"
            f'```python\nimport memgen\n\nagent = memgen.load("{where}")\nprint(agent.generate("..."))\n```\n\n'
            f"| | |\n|---|---|\n{rows}\n\n## Results\n\n{self._results()}\n"
        )

    @property
    def _adapts(self) -> bool:
        """Whether the reasoner itself is adapted, and nothing inserted."""
        return source_class(self.config.weaver).reasoner_adapter is not None

    def _what(self) -> str:
        if self._adapts:
            return (
                "LoRA on the reasoner, trained as [MemGen](https://arxiv.org/abs/2509.24704)'s memory is, which it is compared "
                "with; it inserts no latents."
            )
        return (
            "An agent of [MemGen](https://arxiv.org/abs/2509.24704): a weaver writes latent vectors into the stream of a frozen "
            "language model, and a trigger decides where."
        )

    def _memory(self, kinds: str) -> dict[str, str]:
        if self._adapts:
            return {}
        return {
            "Trained kinds of insertion": kinds or "not known",
            "Trigger": f"`{self.config.trigger.kind}`",
            "Insertions inside an answer": f"up to {self.config.boundaries.max_inference_insertions}",
        }

    def _data(self) -> str | None:
        data = _section(self.run, "data")
        shown = [f"{key} {data[key]}" for key in ("train_examples", "val_examples") if data.get(key)]
        # A path says what the data is called, not where it lies on the author's machine.
        name = Path(str(data["path"])).name if data.get("path") else None
        return ", ".join([*([f"`{name}`"] if name else []), *shown]) or None

    def _results(self) -> str:
        if not self.tests:
            return "No test of these weights was recorded (`memgen test`)."
        lines = [
            "| task | split | items | temperature | metric | mean | 95 % interval |",
            "|---|---|---|---|---|---|---|",
        ]
        for test in self.tests:
            for metric, (mean, low, high) in test.metrics.items():
                interval = "" if low is None or high is None else f"{low:.4f} to {high:.4f}"
                lines.append(
                    f"| {test.environment} | {test.split} | {test.items} | {test.temperature:g} | {metric} | {mean:.4f} | "
                    f"{interval} |"
                )
        return "\n".join([*lines, "", "Intervals are bootstrap intervals over items."])


def _section(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = values.get(name)
    return found if isinstance(found, Mapping) else {}


def _run_of(checkpoint: Path) -> Mapping[str, Any]:
    """The resolved configuration of the run that a checkpoint lies in; empty if it is not there."""
    for folder in list(checkpoint.parents)[:2]:
        for name in _CONFIGURATIONS:
            if (folder / name).is_file():
                found = yaml.safe_load((folder / name).read_text(encoding="utf-8"))
                return found if isinstance(found, Mapping) else {}
    return {}


def _tests_of(model: MemGenModel, checkpoint: Path) -> Iterator[Measured]:
    """Complete recorded tests of these weights, in the folder of runs that a checkpoint lies in."""
    from memgen.results.ledger import read_journal
    from memgen.results.recorded_test import weights_hash
    from memgen.results.score_files import JOURNAL, SUMMARY

    summaries = [
        found
        for folder in list(checkpoint.parents)[:4]
        for found in sorted((folder / _TESTS).glob(f"*/{SUMMARY}"))
    ]
    weights = weights_hash(model) if summaries else None
    for path in summaries:
        try:
            journal = read_journal(path.parent / JOURNAL)
        except (OSError, ValueError):
            continue
        if journal is None or journal.settings.get("agent", {}).get("weights") != weights:
            continue
        summary = json.loads(path.read_text(encoding="utf-8"))
        reward = {"reward": summary["reward"]} if summary.get("reward") else {}
        yield Measured(
            environment=journal.settings["data"]["environment"],
            split=journal.settings["data"]["split"],
            items=summary["items"],
            temperature=journal.settings["generation"]["temperature"],
            metrics={
                name: (value["mean"], value["low"], value["high"])
                for name, value in {**reward, **summary["parts"]}.items()
            },
        )


def _licence_of(config: MemGenConfig) -> str | None:
    """The licence that the base's card names, if the card is on this machine."""
    from huggingface_hub import ModelCard, try_to_load_from_cache

    name = config.backbone.name
    if (known := _LICENCES.get(name.partition("?")[0])) is not None:
        return known
    place: Any = Path(name) / CARD
    if not place.is_file() and name.count("/") == 1:
        place = try_to_load_from_cache(name, CARD, revision=config.backbone.revision)
    if not isinstance(place, str | Path) or not Path(place).is_file():
        return None
    try:
        licence = ModelCard.load(place).data.get("license")
    except (ValueError, OSError):
        return None
    return None if licence is None else str(licence)
