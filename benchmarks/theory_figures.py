"""Draw the pictures of docs/theory.md: python benchmarks/theory_figures.py [FOLDER]."""

from __future__ import annotations

import sys
from pathlib import Path

from infalign.report.theory_figures import draw_gallery

if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent.parent / "docs" / "figures"
    for written in draw_gallery(folder):
        print(written)
