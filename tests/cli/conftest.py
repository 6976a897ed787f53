from __future__ import annotations

from pathlib import Path

# Lightning binds its log to the stderr of the moment it is imported; inside a test that would be closed afterwards.
import lightning.pytorch  # noqa: F401
import pytest

STAGE = """\
seed_everything: 3
trainer:
  accelerator: cpu
  max_steps: 2
  log_every_n_steps: 1
  default_root_dir: runs
  enable_progress_bar: false
  enable_model_summary: false
model:
  class_path: cli.dummy_stage.Stage
  memgen:
    backbone:
      name: small
    weaver:
      inference_latents: 3
data:
  class_path: cli.dummy_stage.Data
  path: /data/${model.memgen.backbone.name}
  environment:
    class_path: cli.dummy_stage.Task
    path: ${data.path}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a stage file; no store of runs is named in the environment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MEMGEN_TRACEBACK", raising=False)
    (tmp_path / "stage.yaml").write_text(STAGE)
    return tmp_path
