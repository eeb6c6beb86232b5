"""Kill runs of every solver at operations on files, one after another, and compare with runs that were left alone.

    python benchmarks/kills.py --count 200 --out kills.jsonl

Each line of the output is one run: killed one to three times, then left to end. A second call goes on from what the
file holds. Every run must end with the results, steps and weights of the run that was never killed.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.faults.jobs import SOLVERS, leftovers, make_job, outcome
from tests.faults.killing import HOW, import_all, run_in_child


def main() -> None:
    """Kill until there were enough kills."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="kills in all")
    parser.add_argument("--out", type=Path, default=Path("kills.jsonl"))
    parser.add_argument("--solver", choices=SOLVERS, action="append", help="only these")
    parser.add_argument("--seed", type=int, default=0)
    settings = parser.parse_args()
    import_all()
    rows = [json.loads(line) for line in settings.out.read_text().splitlines()] if settings.out.exists() else []
    solvers = settings.solver or list(SOLVERS)
    with tempfile.TemporaryDirectory() as folder:
        job = make_job(Path(folder))
        whole = {}
        while sum(row["kills"] for row in rows) < settings.count:
            solver = solvers[len(rows) % len(solvers)]
            if solver not in whole:
                whole[solver] = undisturbed(job, Path(folder), solver)
            chance = random.Random(f"{settings.seed} {len(rows)}")
            row = killed_run(job, Path(folder) / "killed", solver, whole[solver], chance)
            rows.append(row)
            with settings.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{sum(r['kills'] for r in rows)}: {row['solver']}: {row['ended']}", file=sys.stderr, flush=True)
    kills = Counter(row["solver"] for row in rows for _ in range(row["kills"]))
    bad = [row for row in rows if row["ended"] != "identical"]
    print(json.dumps({"kills": dict(kills), "runs": len(rows), "not identical": len(bad), "bad": bad}, indent=1))


def undisturbed(job: Path, folder: Path, solver: str) -> tuple[dict, list, float]:
    """The outcome, the operations and the seconds of a run that is left alone."""
    started = time.monotonic()
    out, told = folder / f"whole-{solver}", folder / f"operations-{solver}.json"
    said = run_in_child(job, out, SOLVERS[solver], folder / "log", list_to=told)
    if said != "done":
        raise SystemExit(said)
    return outcome(out), json.loads(told.read_text()), time.monotonic() - started


def killed_run(job: Path, out: Path, solver: str, whole: tuple[dict, list, float], chance: random.Random) -> dict:
    """One run, killed up to three times in what is left of it: four in five at an operation, one at a random time."""
    expected, operations, seconds = whole
    shutil.rmtree(out, ignore_errors=True)
    log = out.parent / "killed.log"
    log.unlink(missing_ok=True)
    started, kills, left = time.monotonic(), [], len(operations)
    ended = "not identical"
    for _ in range(chance.choice((1, 2, 3))):
        at, how = chance.randrange(left), chance.choice(HOW)
        if chance.random() < 0.2:
            moment = {"after": chance.uniform(0, seconds * left / len(operations))}
        else:
            moment = {"kill_at": at, "how": how}
        said = run_in_child(job, out, SOLVERS[solver], log, **moment)
        if said != "killed":
            break
        kills.append({**moment, "operation": operations[at] if not kills and "kill_at" in moment else None})
        left = max(1, left - at)
    said = run_in_child(job, out, SOLVERS[solver], log)
    if said != "done":
        ended = said
    elif outcome(out) == expected:
        ended = f"leftovers: {left}" if (left := leftovers(out)) else "identical"
    return {
        "solver": solver,
        "kills": len(kills),
        "at": kills,
        "ended": ended,
        "seconds": round(time.monotonic() - started, 1),
        "superseded": sorted(path.name for path in out.glob("superseded/*")),
    }


if __name__ == "__main__":
    main()
