"""The command `memgen` before any heavy import."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

import memgen
from memgen.cli import main as front_end
from memgen.cli.errors import UsageError, nearest, refuses_input


def test_help_lists_every_command(capsys):
    assert front_end.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n  {name} " in printed for name in front_end.COMMANDS)


def test_help_answers_in_under_a_second():
    def seconds() -> float:
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-m", "memgen.cli.main", "--help"], check=True, capture_output=True)
        return time.perf_counter() - begin

    assert min(seconds() for _ in range(3)) < 1


def test_the_front_end_imports_nothing_heavy():
    code = (
        "import sys, memgen.cli.main; "
        "print(*{'torch', 'lightning', 'mlflow', 'yaml', 'omegaconf', 'jsonargparse'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == ""


def test_no_command_shows_the_help_and_fails(capsys):
    assert front_end.main([]) == 2
    assert "usage: memgen" in capsys.readouterr().out


def test_version(capsys):
    assert front_end.main(["--version"]) == 0
    assert capsys.readouterr().out == f"memgen {memgen.__version__}\n"


@pytest.mark.parametrize(("typed", "meant"), [("fti", "fit"), ("tset", "test"), ("demoo", "demo")])
def test_an_unknown_command_names_the_nearest(typed, meant, capsys):
    assert front_end.main([typed]) == 2
    assert capsys.readouterr().err == f"memgen: unknown command '{typed}'; did you mean '{meant}'?\n"


def test_a_command_like_no_other_lists_them_all(capsys):
    assert front_end.main(["xyzzy"]) == 2
    assert "choose one of: fit, validate" in capsys.readouterr().err


def run_with(monkeypatch, error):
    def command(argv):
        raise error

    class Module:
        main = staticmethod(command)

    monkeypatch.setattr(front_end.importlib, "import_module", lambda name: Module)
    return front_end.main(["ui"])


def test_a_usage_error_is_one_line_and_status_2(monkeypatch, capsys):
    assert run_with(monkeypatch, UsageError("no such thing")) == 2
    assert capsys.readouterr().err == "memgen ui: no such thing\n"


def test_ctrl_c_is_one_line_and_status_130(monkeypatch, capsys):
    assert run_with(monkeypatch, KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "memgen ui: interrupted\n"


def test_a_fault_keeps_its_traceback(monkeypatch):
    with pytest.raises(ValueError, match="not ours"):
        run_with(monkeypatch, ValueError("not ours"))


def test_the_traceback_of_a_usage_error_can_be_asked_for(monkeypatch):
    monkeypatch.setenv("MEMGEN_TRACEBACK", "1")
    with pytest.raises(UsageError):
        run_with(monkeypatch, UsageError("no such thing"))


def caught(function) -> Exception:
    with pytest.raises(Exception) as info:  # noqa: PT011 - any
        function()
    return info.value


def test_only_a_raise_of_the_package_counts_as_a_refusal():
    from memgen.types import InsertionPlan

    def in_an_expression():
        return int("x")

    assert refuses_input(caught(lambda: InsertionPlan.from_rows([[0]], [[0]])))
    assert not refuses_input(caught(in_an_expression))
    assert not refuses_input(caught(in_an_expression), within=None)


def test_nearest_is_none_when_nothing_is_like_it():
    assert nearest("max_stepz", ["max_steps", "min_steps"]) == "max_steps"
    assert nearest("qqq", ["max_steps"]) is None


def test_ui_prints_the_command_of_mlflow(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mlflow.db").touch()
    assert front_end.main(["ui", "--print", "--port", "7"]) == 0
    assert (
        capsys.readouterr().out
        == "mlflow ui --backend-store-uri sqlite:///runs/mlflow.db --host 127.0.0.1 --port 7 --workers 1\n"
    )


def test_ui_says_that_nothing_has_been_recorded(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert front_end.main(["ui"]) == 2
    assert "sqlite:///runs/mlflow.db does not exist" in capsys.readouterr().err
