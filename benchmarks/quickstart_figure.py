"""Draw the README's frontier from a finished run: python benchmarks/quickstart_figure.py RUN_FOLDER."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from infalign.evaluation.frontier import frontier
from infalign.evaluation.results import MethodResult
from infalign.report.figures import save_frontier_png

TARGET = Path(__file__).parent.parent / "docs" / "figures" / "quickstart_frontier.png"

if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    content = json.loads((Path(sys.argv[1]) / "evaluation.json").read_text())
    results = [MethodResult.from_dict(entry) for entry in content["results"]]
    panels = [frontier(results, procedure) for procedure in ("Best-of-16", "Worst-of-16")]
    print(save_frontier_png(TARGET, panels))
