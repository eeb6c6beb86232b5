"""How fast a browser shows a comparison of many runs, and how large its page is.

    python benchmarks/report_page.py [--runs 50] [--json]

Real time in a headless Chromium, from the start of the navigation: until the frontier is drawn, and until every figure
is; and the processor time of all of the browser's processes, its start included, which depends less on what else runs.
Beside it, in the same browser, a page with one run: the difference is what the runs cost.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from infalign.evaluation.measure import measure
from infalign.evaluation.results import MethodResult
from infalign.procedures import BestOfN, Standard, WorstOfN
from infalign.report.page import ReportData, write_report

PROCEDURES = [BestOfN(4), BestOfN(2), BestOfN(8), Standard(), WorstOfN(2), WorstOfN(4), WorstOfN(8)]
WATCH = """<script>
const seen = setInterval(() => {
  if (document.querySelector("#frontier-plot .main-svg")) {
    clearInterval(seen);
    requestAnimationFrame(() => console.log(`frontier ${performance.now()}`));
  }
}, 5);
const ready = setInterval(() => {
  if (document.documentElement.dataset.ready) {
    clearInterval(ready);
    console.log(`everything ${performance.now()}`);
  }
}, 5);
</script>"""


def runs(count: int) -> list[MethodResult]:
    """Results that differ; three are measured, the others borrow their numbers with another KL."""
    rng = np.random.default_rng(0)
    measured = []
    for shift in (0.4, 0.7, 1.0):
        ref_rewards_PK, rewards_PG = rng.normal(size=(100, 32)), shift + rng.normal(size=(100, 32))
        kls_PG = shift * rewards_PG - shift**2 / 2
        gold = {"gold": (rewards_PG - shift / 2, ref_rewards_PK)}
        measured.append(measure("run", rewards_PG, ref_rewards_PK, kls_PG, PROCEDURES, judges=gold))
    found = []
    for number in range(count):
        result = measured[number % 3]
        kl = dataclasses.replace(result.kl, estimate=result.kl.estimate * (1 + 0.01 * number))
        found.append(dataclasses.replace(result, label=f"run {number}", series=f"method {number % 5}", kl=kl))
    return found


def seconds_to_draw(page: Path, chromium: str) -> dict[str, float]:
    """Seconds from the start of the navigation."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "page.html"
        copy.write_text(page.read_text().replace("</body>", f"{WATCH}</body>"))
        command = [
            *(chromium, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--no-first-run"),
            *(
                "--window-size=1200,900",
                f"--user-data-dir={folder}/profile",
                "--remote-debugging-port=0",
                copy.as_uri(),
            ),
        ]
        found: dict[str, float] = {}
        with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as browser:
            assert browser.stderr is not None, "it is piped"
            deadline = time.monotonic() + 120
            for line in browser.stderr:
                told = re.search(r"(frontier|everything) ([\d.]+)", line) if "CONSOLE" in line else None
                if told:
                    found[told[1]] = float(told[2]) / 1000
                if len(found) == 2 or time.monotonic() > deadline:
                    break
            found["cpu"] = processor_seconds(folder)
            browser.terminate()
    return found


def processor_seconds(profile: str) -> float:
    """Processor time so far of every process that works on this profile (Linux)."""
    total = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if profile in (process / "cmdline").read_text():
                fields = (process / "stat").read_text().rpartition(")")[2].split()
                total += int(fields[11]) + int(fields[12])
        except OSError:  # it has ended
            continue
    return total / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Write both pages, show them, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    options = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("there is no chromium")
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for count in (1, options.runs):
            data = ReportData(runs(count), "Best-of-4", baseline="run 0")
            started = time.monotonic()
            page = write_report(Path(folder) / f"{count}.html", data)
            written = time.monotonic() - started
            shown = min((seconds_to_draw(page, chromium) for _ in range(3)), key=lambda one: one["everything"])
            rows[str(count)] = {"write": written, "megabytes": page.stat().st_size / 1e6, **shown}
    if options.json:
        print(json.dumps(rows))
        return
    print("| runs | page, MB | frontier drawn, s | everything drawn, s | processor, s | written in, s |")
    print("|---|---|---|---|---|---|")
    for count, row in rows.items():
        numbers = [f"{row['megabytes']:.1f}", *(f"{row[key]:.2f}" for key in ("frontier", "everything", "cpu"))]
        print(f"| {count} | {' | '.join(numbers)} | {row['write']:.1f} |")


if __name__ == "__main__":
    main()
