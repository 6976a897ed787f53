"""Lightning's loggers for other trackers than MLflow, as `conf/tracking/*.yaml` use them beside ours.

They get the metrics of a run and its pages of episodes. Parameters, tables, traces, data sets and checkpoints are MLflow's
alone (`run_logger.py`), as is one run over resumes: a resumed run begins a new version there.
"""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger

from memgen.tracking.episodes import Sample


def csv(root: str = "runs/csv", name: str = "memgen") -> Logger:
    """Metrics as a table: `root/name/version_N/metrics.csv`, and pages of episodes in `samples/` beside it.

    Args:
        root: folder.
        name: folder below it.
    """
    return CSVLogger(root, name)


def tensorboard(root: str = "runs/tensorboard", name: str = "memgen") -> Logger:
    """Event files in `root/name/version_N` for `tensorboard --logdir root`; pages of episodes are texts.

    Args:
        root: folder.
        name: folder below it.

    Raises:
        ValueError: if neither tensorboard nor tensorboardX is installed.
    """
    try:
        return TensorBoardLogger(root, name)
    except ModuleNotFoundError as error:
        raise ValueError("TensorBoard is not installed: pip install 'memgen[tensorboard]'") from error


def wandb(
    project: str = "memgen", root: str = "runs/wandb", name: str | None = None, offline: bool = True
) -> Logger:
    """A run of Weights & Biases, by default kept below `root` for `wandb sync`; pages of episodes are HTML panels.

    Args:
        project: of the run.
        root: folder.
        name: of the run; None: one that wandb makes up.
        offline: whether nothing is sent.

    Raises:
        ValueError: if wandb is not installed.
    """
    Path(root).mkdir(parents=True, exist_ok=True)
    try:
        return WandbLogger(name=name, save_dir=root, project=project, offline=offline)
    except ModuleNotFoundError as error:
        raise ValueError("Weights & Biases is not installed: pip install 'memgen[wandb]'") from error


def log_page(found: Logger, page: str, samples: list[Sample], name: str) -> None:
    """Hands a page of episodes to a tracker that takes one; any other logger gets none.

    Args:
        found: one of the Trainer's loggers.
        page: as HTML.
        samples: the same episodes.
        name: of the page.
    """
    if isinstance(found, CSVLogger):
        folder = Path(found.log_dir) / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.html").write_text(page)
    elif isinstance(found, TensorBoardLogger):
        # Texts there are Markdown: indented lines stay as they are.
        lines = [f"{sample.title}\n\n{sample.prompt}{sample.answer}" for sample in samples]
        text = "\n\n---\n\n".join("\n".join(f"    {line}" for line in entry.splitlines()) for entry in lines)
        found.experiment.add_text(f"samples/{name}", text)
    elif isinstance(found, WandbLogger):
        from wandb import Html

        found.experiment.log({f"samples/{name}": Html(page)})
