"""A small selection of the kill and damage studies (`benchmarks/kills.py`, `damage.py`); run by the tests in a process.

Argument: a folder to work in. Prints one JSON object: for each case what became of it and what the run said.
"""

import json
import shutil
import sys
from pathlib import Path

from tests.faults.damage import read, restarted
from tests.faults.jobs import SOLVERS, leftovers, make_job, outcome
from tests.faults.killing import import_all, run_in_child

STEPS = {"landing": 4, "reshape": 4}


def moments(solver):
    """Where a run of this solver is killed, one after another: the points that once led to a dead end or a loss."""
    last = f"checkpoint-{STEPS.get(solver, 6)}"
    found = [
        ("os.replace", r"run\.json", "before"),
        ("os.mkdir", r"stages$", "after"),
        ("torch.save", rf"{last}/optimizer\.pt", "torn"),
        ("os.replace", rf"{last}/.*infalign_state", "after"),
        ("os.replace", r"result\.json", "after"),
    ]
    if solver == "landing":
        found.insert(4, ("os.replace", r"result\.json", "before"))
    if solver == "reshape":
        found += [("parquet", r"reshape-optimal/rollouts", "torn"), ("os.replace", r"reshape\.json", "before")]
    return found


DAMAGE = [
    # state, file, kind
    ("finished", "run.json", "garble"),
    ("finished", "stages/evaluation.json", "truncate"),
    ("finished", "stages/align-optimal.json", "odd_json"),
    ("finished", "prompts/train.jsonl", "delete"),
    ("finished", "rollouts/reference/rollouts/000000.parquet", "garble"),
    ("finished", "rollouts/reference/manifest.json", "empty"),
    ("finished", "rollouts/reference/rewards/*/000000.parquet", "truncate"),
    ("finished", "calibration/calibrator/sorted.npy", "garble"),
    ("finished", "plan.json", "link"),
    ("finished", "policies/optimal/model/model.safetensors", "garble"),
    ("finished", "policies/optimal/result.json", "folder"),
    ("finished", "evaluation.json", "link_elsewhere"),
    ("training", "policies/optimal/checkpoints/checkpoint-4/model.safetensors", "garble"),
    ("training", "policies/optimal/checkpoints/checkpoint-4/trainer_state.json", "truncate"),
    ("training", "policies/optimal/checkpoints/checkpoint-4/infalign_state.json", "odd_json"),
    ("training", "policies/optimal/checkpoints/checkpoint-4/optimizer.pt", "empty"),
    ("training", "policies/optimal/checkpoints/checkpoint-4/scheduler.pt", "delete"),
    ("training", "policies/optimal/fresh/00002/rollouts/000000.parquet", "garble"),
]


def main():
    top, found = Path(sys.argv[1]), {}
    import_all()
    job, log = make_job(top), top / "log"
    for solver, overrides in SOLVERS.items():
        found[f"whole {solver}"] = run_in_child(job, top / solver, overrides, log)
        found[f"killed {solver}"] = killed(job, top / "killed", solver, outcome(top / solver))
    # Damage: to the mixed run, which has most kinds of files.
    overrides, expected = SOLVERS["mixed"], outcome(top / "mixed")
    training = top / "training"
    run_in_child(job, training, overrides, log, kill_at=("torch.save", r"checkpoint-6/optimizer\.pt"))
    states = {"finished": top / "mixed", "training": training}
    for state, pattern, kind in DAMAGE:
        (name, *_) = [path.relative_to(states[state]) for path in sorted(states[state].glob(pattern))]
        ended, told = restarted(job, states[state], overrides, expected, name=name, kind=kind, copy=top / "copy")
        found[f"{state} {pattern} {kind}"] = {"ended": ended, "told": told}
    found["reading"] = {name: reading(job, top, overrides, name) for name in ("plan.json", "prompts/evaluation.jsonl")}
    for name, changes, calls in INTERRUPTED:
        found[f"interrupted {name}"] = interrupted(job, top, changes, calls)
    found["set aside"] = set_aside(job, top, overrides, training)
    print(json.dumps(found))


def killed(job, out, solver, expected):
    """A run that is killed at each of its moments, one after another, and then ends."""
    shutil.rmtree(out, ignore_errors=True)
    log = out.parent / "killed.log"
    log.unlink(missing_ok=True)
    said = [
        run_in_child(job, out, SOLVERS[solver], log, kill_at=(name, place), how=how)
        for name, place, how in moments(solver)
    ]
    said.append(run_in_child(job, out, SOLVERS[solver], log))
    same = said[-1] == "done" and outcome(out) == expected
    return {"said": said, "identical": same, "leftovers": leftovers(out), "told": log.read_text()}


def reading(job, top, overrides, name):
    """What verbs that only read a run say of a damaged file."""
    copy = top / "copy"
    shutil.rmtree(copy)
    shutil.copytree(top / "mixed", copy)
    (copy / name).write_text("{")
    return run_in_child(job, copy, overrides, top / "log", work=read)


# Ctrl-C in the reward, which is called once for the references, and then once in each step of online training.
INTERRUPTED = [
    ("self-consistent", [*SOLVERS["landing"], "transform=self-consistent", "training.save_steps=100"], 3),
    ("mixed", [*SOLVERS["mixed"], "training.save_steps=100"], 2),
]


def interrupted(job, top, overrides, calls):
    """A training that Ctrl-C stops and that goes on, against one that is left alone."""
    whole, out, log = top / "whole", top / "interrupted", top / "interrupted.log"
    for folder in (whole, out):
        shutil.rmtree(folder, ignore_errors=True)
    log.unlink(missing_ok=True)
    run_in_child(job, whole, overrides, log)
    (job / "countdown").write_text(str(calls))
    stopped = run_in_child(job, out, overrides, log)
    (job / "countdown").unlink()
    log.unlink()
    ended = run_in_child(job, out, overrides, log)
    same = ended == "done" and outcome(out) == outcome(whole)
    return {"stopped": stopped, "ended": ended, "identical": same, "told": log.read_text()}


def set_aside(job, top, overrides, training):
    """What is said where an unfinished training is put aside, for other settings."""
    log = top / "aside.log"
    changed = [*overrides, "training.learning_rate=2.0e-2", "training.steps=3"]
    said = run_in_child(job, training, changed, log, work=lambda pipeline: pipeline.run("train"))
    return {"said": said, "told": log.read_text()}


if __name__ == "__main__":
    main()
