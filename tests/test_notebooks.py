"""Notebooks are stored without outputs, and run."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from memgen.lab.assets import resolve_asset

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))
TRAINING = {
    "01_quick_tour", "02_real_model", "03_anatomy_of_an_answer", "04_memory_analysis", "05_your_own_environment",
}  # fmt: skip
"""Those that train, or ask for a trained weaver, and build the lab's reasoner if it is not there."""


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = code_cells(notebook)
    assert code
    assert not any(cell.outputs or cell.execution_count for cell in code)
    assert notebook.cells[0].cell_type == "markdown"


def run(path, folder):
    """The notebook with its outputs."""
    return execute(nbformat.read(path, as_version=4), folder)


def execute(notebook, folder):
    """Fills in the outputs."""
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=1500, kernel_name="python3", resources=resources).execute()
    return notebook


def printed(notebook) -> str:
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return "".join(output.text for output in outputs if output.get("name") == "stdout")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_the_real_model_is_asked_trained_and_asked_again(tmp_path):
    try:
        resolve_asset("lab:smollm2")
    except OSError as error:
        pytest.skip(str(error))
    (path,) = [path for path in NOTEBOOKS if path.stem == "02_real_model"]
    notebook = nbformat.read(path, as_version=4)
    settings = code_cells(notebook)[0]
    assert re.sub(r"#.*", "", settings.source).split() == ["STEPS", "=", "240", "ITEMS", "=", "16"]
    # What it learns in so few steps is no matter here; benchmarks/real.py measures that.
    settings.source = "STEPS = 2\nITEMS = 3"
    lines = printed(execute(notebook, tmp_path)).splitlines()
    questions = [line for line in lines if line.startswith("question")]
    assert len(questions) == 6
    assert questions[:3] == [re.sub(r" +", "   ", line, count=1) for line in questions[3:]]
    assert sum(line.startswith("with memory  '") for line in lines) == 3
    assert [line.split("  ")[0] for line in lines if "price list right" in line] == [
        "SmolLM2",
        "with memory",
        "another item's memory",
    ]
    assert "image/png" in code_cells(notebook)[-1].outputs[-1]["data"]
    assert not list(tmp_path.iterdir()), "something is left in the folder that the reader works in"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the kernel's own machinery
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize(
    "path", [path for path in NOTEBOOKS if path.stem not in TRAINING], ids=lambda path: path.stem
)
def test_a_notebook_runs(path, tmp_path):
    assert code_cells(run(path, tmp_path))[-1].outputs


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_the_quick_tour_shows_what_memory_is_worth(tmp_path, lab_home, monkeypatch):
    monkeypatch.setenv("MEMGEN_HOME", str(lab_home))
    (path,) = [path for path in NOTEBOOKS if path.stem == "01_quick_tour"]
    notebook = run(path, tmp_path)
    figures = [
        output
        for cell in code_cells(notebook)
        for output in cell.outputs
        if "image/png" in output.get("data", {})
    ]
    assert len(figures) == 5
    lines = printed(notebook).splitlines()

    def scores(name: str, column: int = 0) -> float:
        (line,) = [line for line in lines if re.match(rf"{name} +[0-9]", line)]
        return float(line.removeprefix(name).replace("%", " ").split()[column])

    # The text says so: it must be what a reader sees.
    assert scores("plain model") < 15
    assert scores("memory at every boundary") > 80
    assert scores("another item's memory") < 20
    assert any("[4 latents]" in line and line.endswith("reward 1") for line in lines)
    plain, always, trigger = (scores("shop", column) for column in range(3))
    assert plain + 50 < trigger
    assert always - 10 < trigger
    for kind in ("open", "add", "rev", "walk"):
        plain, always, trigger = (scores(kind, column) for column in range(3))
        assert always < plain
        assert abs(trigger - plain) < abs(always - plain)
    # Nothing is left in the folder that the reader works in.
    assert not list(tmp_path.iterdir())


def run_on_lab(name: str, folder, lab_home, monkeypatch):
    """A notebook of this name, with its outputs."""
    monkeypatch.setenv("MEMGEN_HOME", str(lab_home))
    notebook = run(*[path for path in NOTEBOOKS if path.stem == name], folder)
    assert not list(folder.iterdir()), "nothing is left in the folder that the reader works in"
    return notebook


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_the_anatomy_shows_what_blocks_are_worth(tmp_path, lab_home, monkeypatch):
    lines = printed(run_on_lab("03_anatomy_of_an_answer", tmp_path, lab_home, monkeypatch)).splitlines()
    gains = {
        found[1].strip(): float(found[2])
        for line in lines
        if (found := re.match(r"(.+?) +(\S+) nats$", line))
    }
    # The text says so: it must be what a reader sees.
    assert gains["no block"] == 0.0
    assert gains["all blocks"] > 1.0
    assert len([name for name in gains if name.endswith("alone")]) == 4
    assert sum(line.startswith("block ") and "latents behind" in line for line in lines) == 4


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_the_memory_analysis_sets_every_removal_beside_a_random_one(tmp_path, lab_home, monkeypatch):
    lines = printed(run_on_lab("04_memory_analysis", tmp_path, lab_home, monkeypatch)).splitlines()
    (reward,) = [line for line in lines if line.startswith("as trained: reward")]
    trained, without = (float(number) for number in re.findall(r"[0-9]\.[0-9]+", reward))
    assert without + 0.5 < trained
    removed = [line for line in lines if re.match(r"cluster [0-9] of [0-9] removed", line)]
    assert len(removed) >= 8
    assert all(len(re.findall(r"[0-9]+%| [01]\.[0-9]{2}", line)) == 3 for line in removed)
    assert sum(line.startswith(("Faculties:", "No faculties:")) for line in lines) == 2


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_an_environment_of_ones_own_is_learnt(tmp_path, lab_home, monkeypatch):
    text = printed(run_on_lab("05_your_own_environment", tmp_path, lab_home, monkeypatch))
    assert "the reference answer earns 1.0" in text
    never, always = (
        float(re.search(r"^reward ([0-9.]+) ", part, re.M)[1])
        for part in text.split("--- the trigger invokes")[1:]
    )
    assert never + 0.5 < always
