"""Progress where there is no terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from infalign.cli import console
from infalign.cli.console import ConsoleReporter, time_left


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


@pytest.mark.parametrize("terminal", [True, False])
def test_what_a_server_says_cannot_command_the_terminal(terminal):
    reporter = ConsoleReporter()
    said = io.StringIO()
    # Without colours of its own and without a moving bar, every escape would be the server's.
    reporter.console = Console(file=said, force_terminal=terminal, color_system=None, legacy_windows=False)
    reporter.say("refused: \x1b]0;title\x07\x1b[2Jgone")
    with reporter.stage("Score \x1b[31mred") as progress:
        progress(1, 2, "\x1b[8mhidden")
    assert "refused: \\x1b]0;title\\x07\\x1b[2Jgone" in said.getvalue()
    assert "Score \\x1b[31mred: done" in said.getvalue()
    assert "\x1b[31m" not in said.getvalue()
    assert "\x1b[8m" not in said.getvalue()
