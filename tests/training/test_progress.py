"""The line that says how far a run is."""

from __future__ import annotations

import io
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from letters_stage import write_stage
from memgen.cli.main import main
from memgen.training import progress
from memgen.training.progress import WIDTH, in_words, training_line

METRICS = [
    "train/loss", "reward", "val/exact_match", "perf/tokens_per_second", "perf/rollout_tokens_per_second", "val/other",
]  # fmt: skip
numbers = st.floats(allow_nan=True, allow_infinity=True) | st.floats(0, 1)


@given(
    step=st.integers(0, 10**9),
    steps=st.integers(1, 10**9) | st.just(float("inf")),
    metrics=st.dictionaries(st.sampled_from(METRICS), numbers),
    left=st.none() | st.floats(0, 1e9) | st.just(float("inf")),
)
def test_a_line_fits_its_columns_and_shows_finite_numbers_alone(step, steps, metrics, left):
    line = training_line(step, steps, metrics, left)
    assert len(line) <= WIDTH
    assert line.startswith("step ")
    assert str(step) in line
    assert not re.search(r"\b(nan|inf)\b", line)


def test_a_line_names_the_step_the_score_the_speed_and_the_time_left():
    metrics = {
        "train/loss": 0.41234,
        "val/exact_match": 0.3125,
        "perf/tokens_per_second": 1240.4,
        "val/token_accuracy": 0.5,
    }
    assert training_line(132, 700, metrics, 751) == (
        "step 132/700  loss 0.412  val exact 31.2%  1,240 tok/s  12 min 31 s left"
    )
    assert training_line(3, float("inf"), {"reward": 0.5, "train/loss": 0.1}, None) == "step 3  reward 0.500"


@given(st.integers(0, 10**7))
def test_a_duration_in_words_is_the_duration_to_the_second_or_minute(seconds):
    units = {"h": 3600, "min": 60, "s": 1}
    read = sum(int(n) * units[unit] for n, unit in re.findall(r"(\d+) (h|min|s)\b", in_words(seconds)))
    assert 0 <= seconds - read < (60 if seconds >= 3600 else 1)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("terminal", [True, False])
def test_a_run_shows_its_progress_on_a_terminal_and_in_a_file(tmp_path, monkeypatch, terminal):
    stage = write_stage(tmp_path, enable_progress_bar=True, logger=False, max_steps=4, val_check_interval=2)
    monkeypatch.chdir(tmp_path)
    shown = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr("sys.stderr", shown)
    for pause in ("_REDRAWN_SECONDS", "EVERY_SECONDS"):
        monkeypatch.setattr(progress, pause, 0.0)
    assert main(["fit", "--config", str(stage)]) == 0
    text = shown.getvalue()
    assert ("\r" in text) == terminal
    seen = [line.strip() for line in re.split(r"[\r\n]", text)]
    assert any(line.startswith("step 1/4  loss ") and line.endswith(" left") for line in seen)
    assert [line.split(":")[0] for line in seen if line.startswith("validated")] == [
        "validated at step 2",
        "validated at step 4",
    ]
    assert any(line.startswith("validating: batch 1 of ") for line in seen)
    # What stays on the terminal: nothing is left of a line that was drawn over.
    stays = [line.rsplit("\r", 1)[-1].strip() for line in text.split("\n") if line.strip()]
    assert stays[-1].startswith("step 4/4")
    # Libraries' own reports are kept back.
    assert not re.search("GPU available|Loading weights|weights_only|Seed set", text)


def test_verbose_shows_what_libraries_report(tmp_path, monkeypatch, caplog):
    stage = write_stage(tmp_path, enable_progress_bar=True, logger=False, max_steps=1, val_check_interval=1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEMGEN_VERBOSE", "")  # So that it is as before behind the test.
    with caplog.at_level("INFO", "lightning.pytorch"):
        assert main(["fit", "--verbose", "--config", str(stage)]) == 0
    assert "GPU available" in caplog.text
