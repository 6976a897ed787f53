"""Weaver SFT on letters and a tiny model, as a configuration file for the commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from sft_runs import save_tiny

STAGE: dict[str, Any] = {
    "seed_everything": 3,
    "model": {
        "class_path": "memgen.training.weaver_sft.WeaverSFT",
        "memgen": {
            "backbone": {"dtype": "float32"},
            "weaver": {"prompt_latents": 2, "inference_latents": 2, "lora": {"r": 2, "alpha": 4}},
            "boundaries": {"delimiters": [",", "."], "max_inference_insertions": 2},
        },
        "generation": {"max_new_tokens": 4},
    },
    "data": {
        "class_path": "memgen.data.EnvironmentData",
        "tokenizer": "${model.memgen.backbone.name}",
        "chat_template": "chatml",
        "environment": {"class_path": "sft_runs.Letters"},
        "batch_size": 2,
        "val_batch_size": 3,
    },
    "trainer": {
        "accelerator": "cpu",
        "max_steps": 3,
        "val_check_interval": 3,
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "use_distributed_sampler": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "callbacks": [
            {
                "class_path": "memgen.training.callbacks.AdapterCheckpoint",
                "root": "runs/weaver_sft",
                "monitor": "val/reward",
            },
        ],
    },
}


def write_stage(folder: Path, **trainer: Any) -> Path:
    """Writes a tiny model and `stage.yaml` that uses it.

    Args:
        folder: where.
        trainer: settings of the Trainer in place of those above.
    """
    model = {**STAGE["model"], "memgen": {**STAGE["model"]["memgen"]}}
    model["memgen"]["backbone"] = {"name": str(save_tiny(folder / "base")), "dtype": "float32"}
    stage = {**STAGE, "model": model, "trainer": {**STAGE["trainer"], **trainer}}
    (folder / "stage.yaml").write_text(yaml.safe_dump(stage))
    return folder / "stage.yaml"
