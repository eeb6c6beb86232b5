"""Runs that are killed, damaged or stopped end as if nothing had happened, or say what to do.

A small selection of `benchmarks/kills.py` and `benchmarks/damage.py`: each kind of damage and each solver.
"""

import json
import os
import subprocess
import sys

import pytest

from tests.faults.chosen import DAMAGE, INTERRUPTED, moments
from tests.faults.jobs import SOLVERS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(2400),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes"),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.chosen", str(tmp_path_factory.mktemp("faults"))],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_killed_run_ends_as_one_that_was_left_alone(found, solver):
    assert found[f"whole {solver}"] == "done"
    run = found[f"killed {solver}"]
    assert run["said"] == ["killed"] * len(moments(solver)) + ["done"], "every moment was met"
    assert run["identical"]
    assert run["leftovers"] == []
    steps = 4 if solver in ("landing", "reshape") else 6
    assert f"goes on from step {steps - 2} of {steps}" in run["told"], "the last checkpoint was cut short"


@pytest.mark.parametrize(("state", "file", "kind"), DAMAGE)
def test_what_is_damaged_is_made_again_and_said(found, state, file, kind):
    run = found[f"{state} {file} {kind}"]
    assert run["ended"] == "identical", run["told"]
    assert "Traceback" not in run["told"]
    if state == "training":
        told = "goes on from step 2 of 6"
        assert ("fresh" in file) or told in run["told"], "an older checkpoint serves"
        assert "is damaged" in run["told"] or file.endswith("infalign_state.json")
    elif file not in ("run.json", "recipe.json") and not file.startswith("stages"):
        assert "damaged or missing; it is done again" in run["told"]
        assert file.split("/*")[0] in run["told"], "the file is named"
    elif file.startswith("stages"):
        assert "nothing says with which settings it was made; it is kept in superseded/" in run["told"]
    else:
        assert f"{file} is damaged" in run["told"]


@pytest.mark.parametrize("file", ["plan.json", "prompts/evaluation.jsonl"])
def test_verbs_that_read_a_damaged_run_name_the_file_and_what_to_do(found, file):
    said = found["reading"][file]
    assert f"copy/{file}: this file of the run is damaged or missing. Run its recipe again" in said


@pytest.mark.parametrize("name", [name for name, *_ in INTERRUPTED])
def test_ctrl_c_keeps_the_last_finished_step(found, name):
    run = found[f"interrupted {name}"]
    assert run["stopped"].startswith("stopped: Stopped; the same command goes on from step "), run["stopped"]
    step = run["stopped"].removesuffix(".").split("goes on from ")[1]
    assert run["ended"] == "done"
    assert f"goes on from {step}" in run["told"], "and there it went on"
    assert run["identical"]


def test_an_unfinished_training_that_is_set_aside_is_said(found):
    run = found["set aside"]
    assert run["said"] == "done"
    assert "align-optimal: an unfinished attempt was made with other settings" in run["told"]
    assert "learning_rate: 0.01 then, 0.02 now" in run["told"]
    assert "it is kept in superseded/align-optimal-" in run["told"]
