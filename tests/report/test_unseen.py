"""Names and texts that would command a terminal or reorder a line are written out, the same way everywhere."""

import dataclasses

from infalign.report.markdown import render_markdown
from infalign.report.page import render
from infalign.report.words import cell
from infalign.run.model_card import plain
from tests.report.example import report_data

EVIL = "opt\u202eimal\x1b[2J\u2066"
WRITTEN = "⟨U+202E⟩imal"


def evil_data():
    data = report_data()
    first, *others = data.results
    return dataclasses.replace(
        data, title=f"Run {EVIL}", results=[dataclasses.replace(first, label=EVIL), *others],
        baseline=None, warnings=[f"Note {EVIL}"], versions={"python": EVIL},
    )  # fmt: skip


def unseen(text):
    return sorted({hex(ord(one)) for one in text if one in "\u202e\u2066\x1b"})


def test_markdown():
    text = render_markdown(evil_data())
    assert unseen(text) == []
    assert text.count(WRITTEN) > 4


def test_page_outside_its_data():
    page = render(evil_data())
    before, _, data = page.partition('<script type="application/json"')
    assert unseen(before) == []
    assert WRITTEN in before
    del data  # what the script reads is neutralised by the script


def test_cells_and_cards():
    assert cell("a|b\u202e\x1b") == "a\\|b⟨U+202E⟩\\\\x1b"
    assert plain("a*b\u202e") == "a\\*b⟨U\\+202E⟩"
