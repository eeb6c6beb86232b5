"""What tests of whole commands and whole runs share."""

import sys
from contextlib import contextmanager

import pytest

from infalign.cli.main import main


def infalign(capsys, monkeypatch, *arguments):
    """Exit code, stdout and stderr of one command."""
    monkeypatch.setattr(sys, "argv", ["infalign", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        main()
    captured = capsys.readouterr()
    return exit_.value.code, captured.out, captured.err


class Recorder:
    """A reporter that remembers."""

    def __init__(self):
        self.lines = []

    def say(self, text):
        self.lines.append(text)

    @contextmanager
    def stage(self, title):
        self.lines.append(f"{title} …")
        yield lambda done, total, text: None

    @property
    def done(self):
        return [line.removesuffix(" …") for line in self.lines if line.endswith(" …")]
