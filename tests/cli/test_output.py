"""A terminal that has only ASCII, and a reader that leaves: neither ends a command."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys, types
from memgen.cli import main
command = types.ModuleType("speaks")
def speak(argv):
    print("0.5 ± 0.1 ⟦memory⟧")
    for number in range(20_000):
        print("line", number, file=sys.stderr)
    open("done", "w").close()
    return 0
command.main = speak
sys.modules["speaks"] = command
main.COMMANDS["speak"] = main.Command("speaks", "speaks", trainer=True)
sys.exit(main.main(["speak"]))
"""


@pytest.mark.parametrize("shell", ["{} >out 2>err", "{{ {}; echo $? >status; }} 2>&1 | head -1 >out"])
def test_a_run_ends_well_whatever_its_output_goes_to(tmp_path, shell):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": os.pathsep.join(sys.path)}
    (tmp_path / "program.py").write_text(PROGRAM)
    command = shell.format(f"{sys.executable} program.py")
    subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, check=True, timeout=60)
    assert (tmp_path / "done").exists()
    status = tmp_path / "status"
    assert not status.exists() or status.read_text() == "0\n"
    if Path(tmp_path / "err").exists():
        assert (tmp_path / "out").read_text() == "0.5 \\xb1 0.1 \\u27e6memory\\u27e7\n"
