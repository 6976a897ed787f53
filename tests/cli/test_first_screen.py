"""The first block of README, pasted into a shell in an empty folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_first_block_of_readme_trains_tests_and_answers_in_an_empty_folder(tmp_path, lab_home):
    block = re.search(r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)[
        1
    ]
    environment = {**os.environ, "MEMGEN_HOME": str(lab_home), "HF_HUB_OFFLINE": "1"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    # The command of this environment, whatever is installed beside it.
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "memgen"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m memgen.cli.main "$@"\n')
    command.chmod(0o755)
    environment["PATH"] = f"{command.parent}:{environment['PATH']}"
    (tmp_path / "empty").mkdir()
    done = subprocess.run(
        ["bash", "-e"],
        input=block, cwd=tmp_path / "empty", env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    exact = re.search(r"exact_match\D*([\d.]+)", done.stdout)
    assert exact is not None, done.stdout
    assert float(exact[1]) > 0.8
    *_, prices, total = done.stdout.splitlines()
    assert prices.count("⟦memory⟧") == 4
    assert total.startswith("# ")
