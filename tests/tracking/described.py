"""Description of a run of weaver SFT."""

from __future__ import annotations

from memgen.tracking.run_description import RunDescription

RESOLVED = {
    "seed_everything": 7,
    "model": {
        "class_path": "memgen.training.weaver_sft.WeaverSFT",
        "memgen": {"backbone": {"name": "lab:reasoner"}, "boundaries": {"delimiters": [",", "."]}},
    },
    "data": {
        "environment": {"class_path": "memgen.environments.qa.gsm8k.GSM8K", "init_args": {"path": "x" * 900}}
    },
    "trainer": {"callbacks": [{"class_path": "A", "init_args": {"x": 1}}, "B"], "plugins": []},
}
DESCRIPTION = RunDescription(
    command="fit",
    arguments=("--config", "conf/a.yaml", "--x", "a b"),
    raw={"conf/a.yaml": "x: ${y} # kept\n", "conf/data/b.yaml": "y: 1\n"},
    resolved_yaml="x: 1\ny: 1\n",
    resolved=RESOLVED,
)
