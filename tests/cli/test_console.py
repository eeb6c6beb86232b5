"""Progress where there is no terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from infalign.cli import console
from infalign.cli.console import ConsoleReporter, time_left, visible


def test_time_left():
    assert time_left(10.0, 5, 20) == "0:40 left"
    assert time_left(60.0, 1, 125) == "2:05:00 left"
    assert time_left(10.0, 0, 20) == ""
    assert time_left(10.0, 20, 0) == ""


def test_a_line_has_speed_and_time_left_counted_from_this_start(capsys, monkeypatch):
    now = 100.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    reporter = ConsoleReporter()
    with reporter.stage("Draw") as progress:
        progress(500, 1000, "")  # an earlier run had drawn half of them
        now += 20.0
        progress(600, 1000, "1,234 tokens/s")
    said = capsys.readouterr().err
    if reporter.console.is_terminal:
        pytest.skip("stderr is a terminal")
    assert "Draw: 600/1000  1,234 tokens/s  1:20 left" in said


def test_a_stage_is_called_by_its_name_whatever_it_holds(monkeypatch):
    reporter = ConsoleReporter()
    said = io.StringIO()
    reporter.console = Console(file=said, force_terminal=True, highlight=False, emoji=False, width=100)
    with reporter.stage("Draw [red]x[/b] :x:") as progress:
        progress(1, 2, "")
    assert said.getvalue().count("Draw [red]x[/b] :x:") >= 2
    assert "Draw [red]x[/b] :x:: done" in said.getvalue()


def test_control_characters_are_written_out_for_the_terminal():
    assert visible("f(x) :x: [b] \x1b[31m\x07\r é\t🎉\n") == "f(x) :x: [b] \\x1b[31m\\x07\\x0d é\t🎉\n"
