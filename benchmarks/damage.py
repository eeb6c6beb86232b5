"""Damage every file of run folders in every way, one at a time, start again, and compare.

    python benchmarks/damage.py --out damage.jsonl [--count 100] [--solver reshape]

A run that is finished and one that was stopped within its training are damaged, file by file: cut in half, emptied,
garbled, deleted, replaced by a link or a folder, or by JSON of another shape. A restart must end with what an
undisturbed run found. Verbs that only read a run must name the file and what to do; and doing that must help. A second
call goes on from what the output holds.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.faults.damage import KINDS, files_of, read, restarted
from tests.faults.jobs import SOLVERS, make_job, outcome
from tests.faults.killing import import_all, run_in_child


def main() -> None:
    """Damage until there was enough."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=None, help="cases in all; all of them if not given")
    parser.add_argument("--out", type=Path, default=Path("damage.jsonl"))
    parser.add_argument("--solver", choices=SOLVERS, default="reshape")
    parser.add_argument("--seed", type=int, default=0)
    settings = parser.parse_args()
    import_all()
    rows = [json.loads(line) for line in settings.out.read_text().splitlines()] if settings.out.exists() else []
    done = {(row["state"], row["file"], row["kind"]) for row in rows}
    with tempfile.TemporaryDirectory() as folder:
        top, overrides = Path(folder), SOLVERS[settings.solver]
        job = make_job(top)
        states = make_states(job, top, overrides)
        expected = outcome(states["finished"])
        cases = [
            (state, str(name), kind)
            for state, out in states.items()
            for name in files_of(out)
            for kind in KINDS
            if kind != "odd_json" or name.suffix == ".json"
        ]
        random.Random(settings.seed).shuffle(cases)
        for case in cases[: settings.count]:
            if case in done:
                continue
            state, name, kind = case
            copy = top / "copy"
            reading = None
            if state == "finished":
                reading = how_readers_take_it(job, states[state], overrides, name, kind, copy)
            ended, told = restarted(job, states[state], overrides, expected, name=name, kind=kind, copy=copy)
            row = {"state": state, "file": name, "kind": kind, "ended": ended, "reading": reading}
            if not ended.startswith("identical"):
                row["told"] = told[-2000:]
            rows.append(row)
            with settings.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{len(rows)}/{len(cases)} {state} {name} {kind}: {ended[-300:]}", file=sys.stderr, flush=True)
    print(json.dumps({"cases": len(rows), "ended": Counter(row["ended"][:40] for row in rows).most_common()}, indent=1))


def make_states(job: Path, top: Path, overrides: list[str]) -> dict[str, Path]:
    """A finished run, and one killed in its training, when there were two checkpoints."""
    finished, training = top / "finished", top / "training"
    told = top / "operations.json"
    said = run_in_child(job, finished, overrides, top / "log", list_to=told)
    if said != "done":
        raise SystemExit(said)
    operations = json.loads(told.read_text())
    last = max(
        at for at, (name, place) in enumerate(operations) if place.endswith("result.json") or "result.json" in place
    )
    run_in_child(job, training, overrides, top / "log", kill_at=last - 3)
    return {"finished": finished, "training": training}


def how_readers_take_it(job: Path, out: Path, overrides: list[str], name: str, kind: str, copy: Path) -> str:
    """What verbs say that only read the run: nothing, or an error that names a file and gives a hint."""
    import shutil

    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(out, copy, symlinks=True)
    KINDS[kind](copy / name)
    said = run_in_child(job, copy, overrides, copy.parent / "reading.log", work=read)
    if said == "done":
        return "done"
    named = Path(name).name in said or str(Path(name).parent) in said
    hinted = any(word in said for word in ("again", "calibrate", "evaluate", "Give the folder"))
    return "refused with a hint" if named and hinted and "Traceback" not in said else said[-1500:]


if __name__ == "__main__":
    main()
