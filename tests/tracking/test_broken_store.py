"""Stores that are broken: the run goes on, nothing waits, a few lines say so, and the records are kept."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import sqlite3
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from memgen.tracking.delivery import read_outbox
from memgen.tracking.run_logger import run_logger
from memgen.tracking.store import deliver


def corrupt(folder):
    (folder / "store.db").write_bytes(bytes(range(1, 256)) * 40)
    return f"sqlite:///{folder}/store.db"


def of_another_schema(folder):
    with contextlib.closing(sqlite3.connect(folder / "store.db")) as database:
        database.execute("create table alembic_version(version_num varchar(32))")
        database.execute("insert into alembic_version values ('deadbeef')")
        database.commit()
    return f"sqlite:///{folder}/store.db"


def a_folder(folder):
    return str(folder / "mlruns")


def a_typing_error(folder):
    return "htp://example.org"


def a_folder_in_place_of_the_file(folder):
    (folder / "store.db").mkdir()
    return f"sqlite:///{folder}/store.db"


def told(capfd, caplog):
    """Lines that a terminal shows."""
    own = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    return [*own, *(line for line in capfd.readouterr().err.splitlines() if line.strip())]


def goes_on(uri, folder, capfd, caplog, seconds=15.0):
    """Logs to a broken store as a run does; the outbox that is left."""
    begin = time.monotonic()
    logger = run_logger(root=str(folder), tracking_uri=uri, flush_seconds=1.0, system_seconds=0)
    logger.experiment.set_tag("any", "call")
    assert logger.run_id is None
    logger.log_metrics({"train/loss": 1.0}, step=3)
    logger.finalize("success")
    assert time.monotonic() - begin < seconds
    logger.outbox.stop()
    said = told(capfd, caplog)
    assert len(said) <= 5, said
    assert "Traceback" not in "\n".join(said)
    header, records = read_outbox(logger.outbox.path)
    assert any(record.get("values") == {"train/loss": 1.0} for record in records)
    return header, records


BROKEN = [corrupt, of_another_schema, a_folder, a_typing_error, a_folder_in_place_of_the_file]


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.__name__)
def test_a_run_begins_although_its_store_is_broken(tmp_path, capfd, caplog, broken):
    goes_on(broken(tmp_path), tmp_path / "root", capfd, caplog)


def test_a_store_that_stays_locked_is_not_waited_for(tmp_path, capfd, caplog):
    path = tmp_path / "store.db"
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("create table runs(a)")
        database.execute("BEGIN EXCLUSIVE")
        goes_on(f"sqlite:///{path}", tmp_path / "root", capfd, caplog)


class Other(BaseHTTPRequestHandler):
    """A server that is not MLflow's: it answers everything."""

    def do_GET(self):
        body = json.dumps({"status": "ok"}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *arguments):
        pass


def test_a_server_that_is_not_mlflows_leaves_records_that_can_be_sent(tmp_path, empty_store, capfd, caplog):
    server = HTTPServer(("127.0.0.1", 0), Other)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        header, records = goes_on(f"http://127.0.0.1:{server.server_port}", tmp_path / "root", capfd, caplog)
    finally:
        server.shutdown()
        server.server_close()
    shutil.copy(empty_store, tmp_path / "good.db")
    for left in (header, {**header, "run_id": ""}):  # As an earlier version wrote it.
        run, refused = deliver(
            {**left, "uri": f"sqlite:///{tmp_path}/good.db", "artifacts": tmp_path.as_uri()}, records
        )
        assert run
        assert not refused


def test_a_store_that_is_deleted_meanwhile_is_told_in_a_line(tmp_path, empty_store, capfd, caplog):
    path = tmp_path / "store.db"
    shutil.copy(empty_store, path)
    logger = run_logger(
        root=str(tmp_path / "root"), tracking_uri=f"sqlite:///{path}", flush_seconds=3.0, system_seconds=0
    )
    assert logger.run_id is not None
    assert logger.outbox.flush(30.0) == 0
    capfd.readouterr()
    caplog.clear()
    path.unlink()
    for step in range(20):
        logger.log_metrics({"train/loss": float(step)}, step)
        logger.log_tags({"step": str(step)})
    logger.finalize("success")
    logger.outbox.stop()
    said = told(capfd, caplog)
    assert len(said) <= 5, said
    assert "is gone" in "".join(said)
    assert not path.exists(), "MLflow would make an empty one"
    assert len(read_outbox(logger.outbox.path)[1]) > 20


def test_a_store_that_breaks_within_a_call_is_told_in_a_line(tmp_path, empty_store, capfd, caplog):
    path = tmp_path / "store.db"
    shutil.copy(empty_store, path)
    logger = run_logger(
        root=str(tmp_path / "root"), tracking_uri=f"sqlite:///{path}", flush_seconds=3.0, system_seconds=0
    )
    assert logger.run_id is not None
    assert logger.outbox.flush(30.0) == 0
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("drop table metrics")
        database.commit()
    capfd.readouterr()
    caplog.clear()
    logger.log_metrics({"train/loss": 1.0}, step=3)
    logger.finalize("success")
    logger.outbox.stop()
    said = told(capfd, caplog)
    assert len(said) <= 5, said
    assert "Traceback" not in "".join(said)
    assert "does not take records" in "".join(said)
    assert any("train/loss" in kept.read_text() for kept in logger.outbox.path.parent.iterdir())
