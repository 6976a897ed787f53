"""A lost connection between the processes of a run is told in one line."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from memgen.cli.links import lost_link


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            RuntimeError(
                "[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 20000ms for "
                "recv operation to complete"
            ),
            "(Timed out waiting 20000ms for recv operation to complete)",
        ),
        (
            RuntimeError("Application timeout caused pair closure"),
            "(Application timeout caused pair closure)",
        ),
        (
            dist.DistBackendError("NCCL communicator was aborted on rank 1.\nmore"),
            "(NCCL communicator was aborted on rank 1)",
        ),
    ],
    ids=["gloo", "gloo, the other side", "nccl"],
)
def test_an_error_of_the_network_names_its_reason_and_what_to_do(error, reason):
    told = lost_link(error)
    assert reason in told
    assert "--run FOLDER" in told
    assert "\n" not in told


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA out of memory"), ValueError("gloo")], ids=["memory", "value"]
)
def test_other_errors_stay_what_they_are(error):
    assert lost_link(error) is None
