"""Runs recorded by a real MLflow server, which is killed, started again, and stopped in the middle of a call."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request

import pytest
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

from memgen.cli import main as front_end
from memgen.tracking.run_description import RunDescription
from memgen.tracking.run_logger import log_checkpoint, run_logger
from memgen.tracking.run_record import RunRecord
from memgen.tracking.traces import Trace, TraceSpan
from mlflow_server import Server, answers, free_port

pytestmark = [
    pytest.mark.slow,
    # mlflow warns about its own code as it is imported.
    pytest.mark.filterwarnings("ignore:.*Any type hint is inferred"),
]

STEPS = 60


@pytest.fixture(scope="module")
def server(tmp_path_factory, empty_store):
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(empty_store, folder / "mlflow.db")
    one = Server(folder)
    one.start()
    try:
        one.wait()
        yield one
    finally:
        one.kill()


class Logging(BoringModel):
    """Logs every step, and how long that took."""

    def __init__(self, logger) -> None:
        super().__init__()
        self.run, self.seconds = logger, []

    def training_step(self, batch, batch_idx):
        begin = time.perf_counter()
        self.run.log_metrics({"train/x": float(self.global_step)}, self.global_step)
        self.run.log_text("<p>x</p>", f"samples/step_{self.global_step:06d}.html")
        self.seconds.append(time.perf_counter() - begin)
        time.sleep(0.02)
        return super().training_step(batch, batch_idx)


class Accident(Callback):
    """Kills the server and starts it again, without waiting for it."""

    def __init__(self, server: Server) -> None:
        self.server = server

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 20:
            self.server.kill()
        if trainer.global_step == 40:
            self.server.start()


def trace() -> Trace:
    now = time.time_ns()
    turn = TraceSpan("turn 1", "CHAT_MODEL", now, now + 1000, {"messages": []}, {"choices": []})
    root = TraceSpan("episode", "AGENT", now, now + 2000, {"question": "q"}, {"reward": 0.5})
    return Trace(root, (turn,), {"example": "1"}, 0.5)


def test_a_server_that_dies_in_the_middle_gets_everything_once_it_is_back(server, tmp_path, caplog):
    logger = run_logger(
        tracking_uri=server.uri, root=str(tmp_path), system_seconds=0.2, flush_seconds=300, experiment="dies"
    )
    trainer = Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        limit_val_batches=0,
        logger=logger,
        callbacks=[RunRecord(RunDescription("fit")), Accident(server)],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
    )
    model = Logging(logger)
    trainer.fit(model)
    logger.log_trace(trace())
    checkpoint = tmp_path / "best"
    checkpoint.mkdir()
    (checkpoint / "memgen.json").write_text("{}")
    log_checkpoint([logger], checkpoint, "checkpoints/step_000060_best")
    logger.finalize()
    server.wait()
    # Logging one step took no longer without a server than anything does on a busy machine.
    assert max(model.seconds[21:40]) < 1.0
    assert sum(model.seconds) < 5.0

    client, run_id = logger.experiment, logger.run_id
    rows = [(row.step, row.value) for row in client.get_metric_history(run_id, "train/x")]
    assert rows == [(step, float(step)) for step in range(STEPS)]
    pages = [item.path for item in client.list_artifacts(run_id, "samples")]
    assert pages == [f"samples/step_{step:06d}.html" for step in range(STEPS)]
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert "system/cpu_utilization_percentage" in run.data.metrics
    (found,) = client.search_traces(locations=[run.info.experiment_id])
    assert found.info.trace_metadata["mlflow.sourceRun"] == run_id
    assert [span.name for span in found.data.spans] == ["episode", "turn 1"]
    assert [item.path for item in client.list_artifacts(run_id, "checkpoints/step_000060_best")]
    assert not list((tmp_path / "outbox").glob("*"))
    said = [record.getMessage() for record in caplog.records if server.uri in record.getMessage()]
    assert said[-1] == f"MLflow: {server.uri}/#/experiments/{run.info.experiment_id}/runs/{run_id}"
    assert sum("training goes on" in line for line in said) == 1
    assert sum("answers again;" in line for line in said) == 1


def test_a_server_that_hangs_does_not_hold_the_end_up_and_the_rest_is_delivered_later(
    server, tmp_path, caplog, capsys
):
    logger = run_logger(
        tracking_uri=server.uri, root=str(tmp_path), system_seconds=0, flush_seconds=1.5, experiment="hangs"
    )
    logger.log_metrics({"train/x": 1.0}, 1)
    assert logger.outbox.flush(60) == 0
    server.send(signal.SIGSTOP)
    try:
        logger.log_metrics({"train/x": 2.0}, 2)
        begin = time.perf_counter()
        logger.finalize()
        assert time.perf_counter() - begin < 10
    finally:
        logger.outbox.stop()
        server.send(signal.SIGCONT)
    path = logger.outbox.path
    assert f"memgen deliver {path}" in caplog.text
    assert front_end.main(["deliver", str(path)]) == 0
    assert f"are in run {logger.run_id} now" in capsys.readouterr().out
    assert not path.exists()
    client = logger.experiment
    assert client.get_run(logger.run_id).info.status == "FINISHED"
    assert [row.value for row in client.get_metric_history(logger.run_id, "train/x")] == [1.0, 2.0]


def test_the_command_ui_opens_the_store_of_the_runs(logger, root):
    logger.log_text("<p>here</p>", "samples/a.html")
    assert logger.outbox.flush(60) == 0
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "memgen.cli.main", "ui", "--port", str(port)],
        cwd=root.parent,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        uri = f"http://127.0.0.1:{port}"
        assert answers(uri, process)
        page = f"{uri}/get-artifact?path=samples/a.html&run_uuid={logger.run_id}"
        with urllib.request.urlopen(page, timeout=60) as found:
            assert found.read() == b"<p>here</p>"
        # As Ctrl-C does: to the whole group.
        os.killpg(process.pid, signal.SIGINT)
        process.wait(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(timeout=20)
