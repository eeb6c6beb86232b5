"""Nothing is lost or doubled when the process is killed, at any moment, any number of times."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
def test_killed_at_random_moments(tmp_path, letters):
    harness = Path(__file__).with_name("kill_harness.py")
    done = subprocess.run(
        [sys.executable, str(harness), str(letters.path), str(tmp_path), "52"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["kills"] >= 50
    assert said["half-done"] >= 30  # most kills struck in the middle of the work
