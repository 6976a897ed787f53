"""The soak of the server: nothing of a request is left, and what is left would be seen."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.serving import EXPECTED, Left, Soak, served, soak
from serving_tiny import tiny_agent

CONTEXT, VOCABULARY, ROWS = 512, 256, 4


def test_mixed_requests_with_faults_leave_no_row_no_job_and_no_tensor():
    with served(tiny_agent(trigger="tokens"), ROWS) as port:
        found = soak(port, VOCABULARY, CONTEXT, requests=28, clients=8)
    assert found.wrong == {}
    assert {what.rpartition(":")[0] for what in found.statuses} == set(EXPECTED)
    assert found.cancelled > 0
    assert found.clean
    assert found.left[-1].tensors <= found.left[1].tensors


@pytest.mark.parametrize(
    "change",
    [{"running": 1}, {"waiting": 1}, {"jobs": 1}],
    ids=["a stuck row", "a request in line", "a kept job"],
)
def test_what_is_left_of_a_request_is_a_fault(change):
    good = Left(100.0, 10, 0, 0, 0)
    found = Soak({"whole: 200": 1}, {}, [good, good], 1, 0, 0, True, 1.0)
    assert found.clean
    assert not replace(found, left=[good, replace(good, **change)]).clean
    assert not replace(found, wrong={"whole: 500": 1}).clean
    assert not replace(found, same=False).clean
