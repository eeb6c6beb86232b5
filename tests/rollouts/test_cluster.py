"""A real Ray cluster of two workers on this machine, one of which dies half-way."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from infalign.errors import InputError
from infalign.rollouts.cluster import sample_on_cluster
from infalign.rollouts.prompts import Prompt

has_ray = importlib.util.find_spec("ray") is not None


@pytest.mark.slow
@pytest.mark.skipif(not has_ray, reason="Ray is not installed (pip install 'infalign[ray]')")
def test_a_worker_killed_half_way_changes_nothing(tmp_path, letters):
    harness = Path(__file__).with_name("ray_harness.py")
    command = [sys.executable, str(harness), str(letters.path), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    if done.returncode == 77:
        pytest.skip(done.stderr.splitlines()[-1])
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["workers"] == 2
    assert 600 <= said["killed at"] < 1200
    assert said["drawn"] == 1000  # 40 prompts × 30, of which one process had drawn 40 × 5
    assert said["rows"] == 1200
    assert said["again"] == 0
    assert said["same"], "the cluster drew other rollouts than one process"
    assert said["largest difference of log-probabilities"] < 1e-4


@pytest.mark.skipif(has_ray, reason="Ray is installed")
def test_without_ray_the_mend_is_said(tmp_path, letters):
    with pytest.raises(InputError, match=r"infalign\[ray\]"):
        sample_on_cluster(letters.path, [Prompt("a")], 1, store=tmp_path / "store", max_new_tokens=2, seed=0)


@pytest.mark.skipif(not has_ray, reason="Ray is not installed (pip install 'infalign[ray]')")
def test_what_cannot_be_drawn_is_said_before_any_worker_starts(tmp_path, letters):
    settings = {"store": tmp_path / "store", "max_new_tokens": 8, "seed": 0}
    with pytest.raises(InputError, match="leaves no room for 8 new tokens"):
        sample_on_cluster(letters.path, [Prompt("x" * 95)], 1, **settings)
    with pytest.raises(InputError, match="num_workers 0"):
        sample_on_cluster(letters.path, [Prompt("x")], 1, num_workers=0, **settings)
