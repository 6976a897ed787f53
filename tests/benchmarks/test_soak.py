"""The judge of the soak: what it samples, and which checkpoints it finds broken."""

from __future__ import annotations

import itertools
import math

import torch
from safetensors.torch import save_file

from benchmarks.soak import KINDS, STAGES, Fault, unreadable


def test_every_kind_happens_to_every_stage():
    pairs = set(itertools.product(STAGES, KINDS))
    faults = [Fault.sample(seed=3, index=index) for index in range(len(pairs))]
    assert {(fault.stage, fault.kind) for fault in faults} == pairs
    assert faults == [Fault.sample(seed=3, index=index) for index in range(len(pairs))]
    assert all(fault.variant in KINDS[fault.kind] and 0 <= fault.moment <= 1 for fault in faults)


def test_broken_and_infinite_checkpoints_are_found(tmp_path):
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "half.safetensors").write_bytes(b"half")
    save_file({"a": torch.ones(2)}, tmp_path / "good.safetensors")
    torch.save({"states": [{"a": torch.ones(2)}], "step": 3}, tmp_path / "good.ckpt")
    assert list(unreadable(tmp_path)) == []
    save_file({"a": torch.tensor([1.0, math.nan])}, tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes(b"half")
    torch.save({"states": [{"a": torch.tensor([math.inf])}]}, tmp_path / "c.ckpt")
    (tmp_path / "d.ckpt").symlink_to("gone.ckpt")
    found = list(unreadable(tmp_path))
    assert [line.split()[0] for line in found] == ["a.safetensors", "b.safetensors", "c.ckpt", "d.ckpt"]
