"""`memgen fit|validate|test|predict`: one resolved configuration, one Trainer, LightningCLI in between."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast, final

import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from typing_extensions import override

from memgen.analysis.subject import Subject
from memgen.cli import config, explain, reference
from memgen.cli.config import Document, Layer, Request
from memgen.cli.errors import UsageError, refuses_input
from memgen.cli.gold import test_gold
from memgen.cli.links import STATUS, lost_link
from memgen.cli.names import Resolver, names_in
from memgen.cli.options import take_options
from memgen.cli.output import keep_libraries_quiet
from memgen.data import EnvironmentData
from memgen.files import current, timed_path
from memgen.results.recorded_test import RecordedTest
from memgen.run_context import RunContext, run_context
from memgen.running.interrupt import Interrupted
from memgen.running.resume import LAST, ResumeCheckpoint, StepSeeds, last_checkpoint
from memgen.running.settings import changed_settings, recorded_configuration
from memgen.tracking.address import DEFAULT_ROOT
from memgen.tracking.run_description import RunDescription
from memgen.tracking.run_logger import RunLogger, resumed_logger, run_id_of, run_logger
from memgen.tracking.run_record import RunRecord
from memgen.training.callbacks import RESUME
from memgen.training.checkpoint import CONFIG_FILE, defaults_of, require_readable
from memgen.training.progress import ProgressLine
from memgen.training.stage import Stage, require_precision

logger = logging.getLogger(__name__)

STAGE_EXAMPLE = "conf/weaver_sft.yaml"
HELP_OPTIONS = ("-h", "--help")
TRAINER_HELP = "--help-trainer"
CLASS_HELP = ".help"
"""End of an option that takes a class."""
RECORDS_OPTION = "--records"
"""Of `memgen test`: the folder of its records."""
DATA_CLASS = "memgen.data.EnvironmentData"
GOLD_OPTION = "--gold"
"""Of `memgen test`: the reference answers are tested, and no model."""
SECTION_CLASSES = {"model": LightningModule, "data": LightningDataModule}


def main(argv: Sequence[str]) -> int:
    """Runs a method of the Trainer.

    Args:
        argv: the command (fit, validate, test or predict) and the arguments after it.

    Returns:
        The exit status.

    Raises:
        UsageError: if the command line or the configuration cannot be used.
        KeyboardInterrupt: after Ctrl-C, once Lightning has shut down.
    """
    command, *arguments = argv
    if any(argument in HELP_OPTIONS for argument in arguments):
        print(reference.help_text(command), end="")
        return 0
    if TRAINER_HELP in arguments:
        return _print_trainer_help(command)
    if any(argument.partition("=")[0].endswith(CLASS_HELP) for argument in arguments):
        print(_class_help(arguments), end="")
        return 0
    if command == "test" and GOLD_OPTION in arguments:
        arguments.remove(GOLD_OPTION)
        return test_gold(built(Request.from_argv(arguments)).datamodule)
    own, arguments = take_options(arguments, (RECORDS_OPTION,) if command == "test" else ())
    return execute(command, Request.from_argv(arguments), records=_records_folder(own))


def execute(
    command: str,
    request: Request,
    *,
    records: str | None = None,
    instead: Callable[[TrainerCommand], None] | None = None,
) -> int:
    """Resolves the configuration, builds everything that it names, and runs.

    Args:
        command: fit, validate, test or predict.
        request: the command line.
        records: of `test`: the folder of its records, or None for the usual one.
        instead: of `predict`: called in place of the Trainer's method.

    Returns:
        The exit status.

    Raises:
        UsageError: if the configuration cannot be used.
        KeyboardInterrupt: after Ctrl-C, once Lightning has shut down.
    """
    layers = _layers(request)
    merged = config.merge(layers)
    document = config.resolve(merged, layers)
    if request.run is not None and request.run.exists() and not request.run.is_dir():
        raise UsageError(f"{request.run} is a file; --run takes the folder of a run")
    if command == "fit" and request.run is not None and document.get("ckpt_path") is None:
        last = last_checkpoint(request.run)
        document["ckpt_path"] = None if last is None else str(last)
        begun = any((request.run / weights).exists() for weights in ("best", "last"))
        if last is None and begun and getattr(rank_zero_only, "rank", 0) in (None, 0):
            logger.warning(
                "%s has no checkpoint to go on from, so its run begins again at step 0", request.run
            )
    require_checkpoints(document)
    if document.get("ckpt_path") is not None:
        # Our .ckpt files hold no pickled objects.
        document.setdefault("weights_only", True)
    _quieten()
    try:
        TrainerCommand(
            command=command,
            request=request,
            layers=layers,
            document=document,
            records=records,
            instead=instead,
        )
    except Interrupted as stop:
        # Lightning has torn down. Only rank 0 reports: a launcher would kill the others if one failed.
        if getattr(rank_zero_only, "rank", 0) not in (None, 0):
            return 0
        print(f"memgen {command}: {stop}", file=sys.stderr)
        return stop.status
    except RuntimeError as error:
        lost = lost_link(error)
        if lost is None:
            raise
        print(f"memgen {command}: {lost}", file=sys.stderr)
        return STATUS
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):
            # Lightning has saved and torn down, and then left through sys.exit(1).
            raise KeyboardInterrupt from stop
        return stop.code if isinstance(stop.code, int) else 0
    return 0


def _layers(request: Request) -> list[Layer]:
    """The sources of the configuration. What none of them sets is taken from the checkpoint that it starts from."""
    layers = request.layers()
    merged = config.merge(layers)
    _require_stage(merged, layers)
    start = config.value_of(merged, "model.init_from")
    if not isinstance(start, str) or not (current(Path(start)) / CONFIG_FILE).is_file():
        return layers
    values = defaults_of(
        Path(start),
        with_trigger=config.value_of(merged, "model.memgen.trigger.kind") is None,
        with_data=config.value_of(merged, "data.class_path") == DATA_CLASS,
    )
    return [Layer(name=str(Path(start) / CONFIG_FILE), text=yaml.safe_dump(values), values=values), *layers]


def describe(request: Request) -> RunDescription:
    """Resolves the configuration of `fit` and describes the run.

    Raises:
        UsageError: if the configuration is refused.
    """
    return built(request).description()


def built(request: Request) -> TrainerCommand:
    """Resolves the configuration of `fit` and builds everything but the Trainer, which needs the machine.

    Raises:
        UsageError: if the configuration is refused.
    """
    return built_from(request, _layers(request))


def built_from(request: Request, layers: Sequence[Layer]) -> TrainerCommand:
    """As `built`, of sources of which not all are files.

    Raises:
        UsageError: if the configuration is refused.
    """
    merged = config.merge(layers)
    _require_stage(merged, layers)
    document = config.resolve(merged, layers)
    require_checkpoints(document)
    _quieten()
    return TrainerCommand(
        command="fit", request=request, layers=layers, document=document, without_trainer=True
    )


@final
class TrainerCommand(LightningCLI):
    """LightningCLI that reads its configuration from a document instead of its own arguments.

    Building one runs the command, as with LightningCLI.

    Args:
        command: fit, validate, test or predict.
        request: the command line; None only to print help.
        layers: the sources of the configuration.
        document: the resolved configuration, without `init_args`; None only to print help.
        records: folder of a test's records, or None for the usual one.
        instead: called in place of the Trainer's `predict`.
        without_trainer: build everything but the Trainer, and run nothing.
        args: arguments for LightningCLI's own parser, to print help.

    Raises:
        UsageError: if the configuration is refused.
    """

    def __init__(
        self,
        *,
        command: str,
        request: Request | None = None,
        layers: Sequence[Layer] = (),
        document: Document | None = None,
        records: str | None = None,
        instead: Callable[[TrainerCommand], None] | None = None,
        without_trainer: bool = False,
        args: ArgsType = None,
    ) -> None:
        self._command = command
        self._request = request
        self._layers = layers
        self._document = document
        self._records = records
        self._instead = instead
        self._without_trainer = without_trainer
        # Errors are raised, so that they can be printed as one line.
        strict: dict[str, Any] = {"exit_on_error": document is None}
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=None,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_kwargs={**strict, command: strict},
            args=args,
        )

    @override
    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        # Only this command's parser: building one takes as long as the rest of the parsing.
        everything = self.subcommands()
        self.subcommands = lambda: {self._command: everything[self._command]}  # type: ignore[method-assign]
        super()._add_subcommands(parser, **kwargs)

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        if self._document is None:
            self.config = parser.parse_args(args)
            return
        try:
            self.config = parser.parse_object(
                {"subcommand": self._command, self._command: config.with_init_args(self._document)}
            )
        except ArgumentError as error:
            raise UsageError(self._explain(error)) from error

    @override
    def before_instantiate_classes(self) -> None:
        if self._request is not None and self._request.print_config:
            print(self.resolved_yaml(), end="")
            raise SystemExit(0)
        ckpt = self._get(self.config, "ckpt_path")
        if self._command == "fit" and isinstance(ckpt, str):
            self._compare_with_run(Path(ckpt))

    def _compare_with_run(self, ckpt: Path) -> None:
        """Names the settings that differ from those of the run that is resumed; refuses those that cannot."""
        before = recorded_configuration(ckpt)
        changed = [] if before is None else changed_settings(ckpt, before, self.resolved())
        if changed and getattr(rank_zero_only, "rank", 0) in (None, 0):
            logger.warning("the run goes on under other settings: %s", "; ".join(changed))

    @override
    def instantiate_classes(self) -> None:
        try:
            if self._without_trainer:
                self.config_init = self.parser.instantiate_classes(self.config)
                self.datamodule = self._get(self.config_init, "data")
                return
            super().instantiate_classes()
            if isinstance(self.model, Stage):
                require_precision(self.trainer)
        except (TypeError, ValueError) as error:
            cause = _root_cause(error)
            if isinstance(cause, ValueError) and refuses_input(cause, within=None):
                raise UsageError(str(cause)) from error
            # jsonargparse lets some errors through to the constructor: a missing argument, a number in place of a record.
            problem = None if self._document is None else self._find_problem()
            if problem is not None:
                raise UsageError(_locate(problem, self._layers)) from error
            raise cause from None
        # Assets that must be trained or fetched first are made here, before the Trainer starts processes and a run.
        for name in names_in(self.resolved()):
            run_context(self.trainer).resolve_asset(name)

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        if not self._without_trainer:
            super()._run_subcommand(subcommand)

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        settings = self._get(self.config_init, "trainer", default={})
        if settings.get("logger") in (None, True):
            # Lightning switches every logger off for a fast_dev_run.
            kwargs["logger"] = False if settings.get("fast_dev_run") else run_logger()
        callbacks = _as_list(settings.get("callbacks"))
        ckpt = self._get(self.config_init, "ckpt_path")
        callbacks.append(
            RunContext(
                folder=self._run_folder,
                resumed_from=None if ckpt is None else Path(ckpt),
                resolve_asset=Resolver(_store_of(kwargs.get("logger", settings.get("logger")))),
                configuration=self.resolved_yaml() if self._command == "fit" else None,
            )
        )
        if self._command == "fit":
            callbacks.append(StepSeeds())
            wanted = settings.get("enable_checkpointing") is not False and not settings.get("fast_dev_run")
            if wanted and not any(isinstance(callback, ResumeCheckpoint) for callback in callbacks):
                callbacks.append(ResumeCheckpoint())
        if self._command == "test":
            callbacks.append(self._recorded_test())
        if settings.get("enable_progress_bar") is not False and not any(
            isinstance(callback, ProgressBar) for callback in callbacks
        ):
            callbacks.append(ProgressLine())
        kwargs["callbacks"] = [*callbacks, RunRecord(self.description())]
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (ValueError, MisconfigurationException) as error:
            raise UsageError(f"the Trainer refuses its settings: {_one_line(str(error))}") from error
        resumed = self._get(self.config_init, "ckpt_path") if self._command == "fit" else None
        if self._command == "fit" and resumed is None and self._request is not None and self._request.run:
            # A run that was submitted, or stopped before its first checkpoint, already has a record.
            resumed = str(self._request.run / RESUME / LAST)
        if isinstance(resumed, str):
            trainer.loggers = [
                resumed_logger(found, Path(resumed)) if isinstance(found, RunLogger) else found
                for found in trainer.loggers
            ]
        return trainer

    def _recorded_test(self) -> RecordedTest:
        described = self.description()
        settings = described.resolved
        return RecordedTest(
            root=str(self._root),
            folder=self._records,
            environment=(settings.get("data") or {}).get("environment"),
            about={"arguments": list(described.arguments)},
        )

    @property
    def _run_folder(self) -> Path | None:
        run = None if self._request is None else self._request.run
        # `latest` is a link, which will point to this run again.
        return run.resolve() if run is not None and run.is_symlink() else run

    @property
    def _root(self) -> Path:
        return Path(self._get(self.config_init, "trainer").get("default_root_dir") or DEFAULT_ROOT)

    def test(self, **kwargs: Any) -> None:
        """Calls the Trainer's `test`, as LightningCLI does, and prints the summary."""
        self.trainer.test(**kwargs)
        callbacks: list[Any] = getattr(self.trainer, "callbacks")  # noqa: B009 - set later than it is typed
        for found in callbacks:
            if not isinstance(found, RecordedTest) or found.summary is None or found.records is None:
                continue
            if self.trainer.is_global_zero:
                print("\n".join([*found.summary.lines(), f"records: {found.records.folder}"]))

    def predict(self, **kwargs: Any) -> None:
        """Calls the Trainer's `predict`, as LightningCLI does, and writes the predictions: one JSON line per item."""
        if self._instead is not None:
            self._instead(self)
            return
        batches = self.trainer.predict(**kwargs) or []
        folder, several = self._root / "predictions", self.trainer.world_size > 1
        folder.mkdir(parents=True, exist_ok=True)
        name = run_id_of(self.trainer.loggers)
        if name is None and self.trainer.is_global_zero:
            ending = ".rank0.jsonl" if several else ".jsonl"
            name = timed_path(folder, ending).name.removesuffix(ending)
        name = self.trainer.strategy.broadcast(name)
        part = f".rank{self.trainer.global_rank}" if several else ""
        path = folder / f"{name}{part}.jsonl"
        with path.open("w", encoding="utf-8") as file:
            for batch in batches:
                file.writelines(
                    json.dumps(item, ensure_ascii=False) + "\n" for item in cast(list[Any], batch)
                )
        print(f"predictions: {path}")

    def resolved(self) -> Document:
        """The complete configuration, without `init_args`, defaults included."""
        dumped = yaml.safe_load(
            self.parser.dump(self.config, skip_unset=False, skip_link_targets=False, skip_validation=True)
        )
        values = {key: value for key, value in dumped[self._command].items() if key != "config"}
        return cast(Document, config.without_init_args(values))

    def resolved_yaml(self) -> str:
        """The complete configuration as YAML that `--config` reads back as the same."""
        return config.to_yaml(self.resolved())

    def description(self) -> RunDescription:
        """Command and configuration, for the run's record."""
        assert self._request is not None, "a command that runs has a request"
        resolved = self.resolved()
        return RunDescription(
            command=self._command,
            arguments=self._request.arguments,
            raw={layer.name: layer.text for layer in self._layers if layer.name != config.COMMAND_LINE},
            resolved_yaml=config.to_yaml(resolved),
            resolved=resolved,
        )

    def _find_problem(self) -> explain.Problem | None:
        assert self._document is not None, "only a document can be refused"
        method = explain.parameters(getattr(Trainer, self._command))
        skipped = {"self", *LightningCLI.subcommands()[self._command]}
        top_level: dict[str, Any] = {"seed_everything": bool | int}
        top_level |= {name: item.annotation for name, item in method.items() if name not in skipped}
        return explain.find_problem(self._document, {**SECTION_CLASSES, **top_level}, {"trainer": Trainer})

    def _explain(self, error: ArgumentError) -> str:
        problem = self._find_problem()
        return _locate(problem, self._layers) if problem is not None else _one_line(str(error))


def stage_and_data(
    command: TrainerCommand, name: str, *, needs_checkpoint: bool
) -> tuple[Any, EnvironmentData]:
    """The stage and the data of a command that plays a split itself, in place of the Trainer's `predict`.

    Args:
        command: what was built.
        name: the command's, for messages.
        needs_checkpoint: whether it refuses to play a model without a checkpoint directory. Such a command also plays in
            one process.

    Raises:
        UsageError: if the two are not memgen's, the checkpoint is absent or one to resume training from, or several
            processes would play.
    """
    stage, data, trainer = command.model, command.datamodule, command.trainer
    if not isinstance(data, EnvironmentData) or not hasattr(stage, "generation"):
        raise UsageError("needs a stage of memgen and memgen.data.EnvironmentData")
    resumed = command._get(command.config, "ckpt_path")
    if resumed is not None:
        raise UsageError(
            f"ckpt_path is {resumed}, a checkpoint to resume training from; memgen {name} needs a checkpoint directory: "
            "--checkpoint DIR"
        )
    if needs_checkpoint and stage.init_from is None:
        raise UsageError("needs a checkpoint directory: --checkpoint DIR")
    if needs_checkpoint and trainer.world_size > 1:
        raise UsageError(
            f"plays in one process, got {trainer.world_size}; set trainer.devices and trainer.num_nodes to 1"
        )
    return stage, data


def subject_of(
    command: TrainerCommand, name: str, out: Path | None, *, needs_checkpoint: bool = True
) -> Subject:
    """What a command that plays a split itself is to play.

    Args:
        command: what was built.
        name: the command's, for messages.
        out: folder of its records, or None for the usual one.
        needs_checkpoint: as for `stage_and_data`.

    Raises:
        UsageError: likewise.
    """
    stage, data = stage_and_data(command, name, needs_checkpoint=needs_checkpoint)
    resolved = command.resolved()
    return Subject(
        memgen=stage.config,
        data=data,
        generation=stage.generation,
        episodes=stage.episodes,
        init_from=stage.init_from,
        environment=resolved["data"]["environment"],
        resolve_asset=data.resolve_asset,
        root=Path(resolved["trainer"].get("default_root_dir") or DEFAULT_ROOT),
        out=out,
    )


def _store_of(loggers: Any) -> str | None:
    """URI of the store that records the Trainer's runs, if any."""
    return next((found.address.uri for found in _as_list(loggers) if isinstance(found, RunLogger)), None)


def _records_folder(own: Sequence[str]) -> str | None:
    """The value of `--records DIR` or `--records=DIR`."""
    if not own:
        return None
    value = own[-1].removeprefix(f"{RECORDS_OPTION}=")
    if value in ("", RECORDS_OPTION):
        raise UsageError(f"{RECORDS_OPTION} needs a value: {RECORDS_OPTION} DIR")
    return value


def _print_trainer_help(command: str) -> int:
    """Prints LightningCLI's own help."""
    try:
        TrainerCommand(command=command, args=[command, "--help"])
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    return 0


def _class_help(arguments: Sequence[str]) -> str:
    """The keys of a class, for `--model.help CLASS`."""
    (index, option), *_ = [
        (index, argument)
        for index, argument in enumerate(arguments)
        if argument.partition("=")[0].endswith(CLASS_HELP)
    ]
    name, _, path = option.partition("=")
    path = path or next(iter(arguments[index + 1 :]), "")
    if "." not in path:
        raise UsageError(f"{name} takes the import path of a class, as in {name} {DATA_CLASS}; got {path!r}")
    found, reason = explain.load_class(path, object)
    if reason is not None:
        raise UsageError(f"{name} {path}: {reason}")
    return reference.class_help(found, name.removeprefix("--").removesuffix(CLASS_HELP))


def _require_stage(merged: DictConfig, layers: Sequence[Layer]) -> None:
    """Checks the class paths of model and data first, since errors elsewhere may follow from them.

    The most frequent error is a configuration of overlays only, without a stage.
    """
    values = cast(Document, OmegaConf.to_container(merged, resolve=False))
    for section in ("trainer", *SECTION_CLASSES):
        settings = values.get(section)
        if settings is not None and not isinstance(settings, dict):
            problem = explain.Problem(section, f"must be a mapping, got {settings!r}")
            raise UsageError(_locate(problem, layers))
    for section, base in SECTION_CLASSES.items():
        chosen = (values.get(section) or {}).get("class_path")
        if chosen is None and section == "model":
            raise UsageError(
                "model.class_path is not set, so there is no stage to run; "
                f"begin with a stage file: --config {STAGE_EXAMPLE}"
            )
        reason = None if chosen is None or "${" in str(chosen) else explain.load_class(chosen, base)[1]
        if reason is not None:
            raise UsageError(_locate(explain.Problem(f"{section}.class_path", reason), layers))


def require_checkpoints(document: Document) -> None:
    """Refuses a checkpoint that does not exist before anything is loaded."""
    start = document["model"].get("init_from")
    # A name with a colon, such as lab:weaver_sft, is resolved by the stage.
    if isinstance(start, str) and ":" not in start and not (current(Path(start)) / CONFIG_FILE).is_file():
        raise UsageError(
            f"{start} is no checkpoint directory: it has no {CONFIG_FILE} (--checkpoint, model.init_from)"
        )
    resumed = document.get("ckpt_path")
    # Other names are Lightning's own: best, last, hpc, registry:NAME.
    if isinstance(resumed, str) and (resumed.endswith(".ckpt") or Path(resumed).exists()):
        require_readable(Path(resumed))


def _quieten() -> None:
    """Keeps libraries quiet, and filters their warnings about what is meant so."""
    keep_libraries_quiet()
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)")
    # A resumed run continues in its folder.
    warnings.filterwarnings("ignore", message=r"Checkpoint directory .* exists and is not empty")
    # A test needs none of the callbacks that a training run's .ckpt has a state of.
    warnings.filterwarnings("ignore", message=r"Be aware that when using `ckpt_path`, callbacks used")
    # The frozen base stays in evaluation mode by design.
    warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode at the start of training")
    # Lightning's advice on a login node; `memgen submit` is how to run from there.
    warnings.filterwarnings("ignore", message=r"The `srun` command is available")


def _root_cause(error: Exception) -> Exception:
    """The constructor's error below jsonargparse's report that no branch of a union fits."""
    cause = error
    while isinstance(cause.__cause__, Exception) and "Union subtypes" in str(cause):
        cause = cause.__cause__
    return cause


def _locate(problem: explain.Problem, layers: Sequence[Layer]) -> str:
    source = config.source_of(problem.key, layers)
    hint = ""
    if problem.unquoted is not None:
        written = config.written(problem.key, problem.unquoted, layers)
        hint = f"; to mean the text, quote it: '\"{written}\"'"
    return f"{problem.key}{f' ({source})' if source else ''} {problem.message}{hint}"


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]


def _one_line(message: str) -> str:
    """The part of jsonargparse's message that is about one key."""
    lines = [line.strip(" -") for line in message.splitlines() if line.strip()]
    noise = ("Does not validate", "Subtypes:", "Errors:", "Given value", "Expected a <class 'NoneType'>")
    return " ".join(line for line in lines if not line.startswith(noise))
