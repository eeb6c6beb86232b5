"""Answers on disk: what is there is found again, a cut line goes, and what was made otherwise is refused."""

from __future__ import annotations

import json

import pytest

from infalign.errors import MismatchError, StorageError
from infalign.procedures import BestOfN
from infalign.rollouts.prompts import Prompt
from infalign.select.answers import AnswerFile, answer_row
from infalign.select.decoder import Candidate, Decoded

MADE_BY = {"seed": 1, "procedure": {"kind": "best-of-n", "n": 2}, "pair": (1, 2)}


def answer(text, said=("good", "better")):
    candidates = tuple(Candidate(one, float(i), None, 3, "stop") for i, one in enumerate(said))
    return Decoded(Prompt(text), candidates[1], candidates, 6, 0.5, BestOfN(2))


def test_a_row_says_everything():
    row = answer_row(answer("p"))
    assert (row["response"], row["reward"], row["chosen"], row["num_tokens"]) == ("better", 1.0, 1, 6)
    assert row["candidates"][0]["text"] == "good"
    assert row["procedure"] == "Best-of-2"
    twins = answer_row(answer("p", ("same", "same")))
    assert twins["chosen"] == 1


def test_what_is_there_is_found_again(tmp_path):
    file = AnswerFile(tmp_path / "deep" / "answers.jsonl", MADE_BY)
    strange = "line\u2028break, half a pair \ud83d, and\nmore"
    with file.writing() as done:
        assert done == set()
        file.append([answer("a"), answer(strange, ("x", strange))])
        file.append([])
    with file.writing() as done:
        assert done == {Prompt("a").id, Prompt(strange).id}
        file.append([answer("c")])
    lines = file.path.read_bytes().split(b"\n")
    assert len(lines) == 4
    assert json.loads(lines[1].decode("utf-8"))["response"] == strange


def test_a_line_that_was_cut_short_goes(tmp_path):
    file = AnswerFile(tmp_path / "answers.jsonl", MADE_BY)
    with file.writing():
        file.append([answer("a"), answer("b")])
    whole = file.path.read_bytes()
    first = whole.index(b"\n") + 1
    for cut in (first, first + 1, len(whole) - 1):
        file.path.write_bytes(whole[:cut])
        with file.writing() as done:
            assert done == {Prompt("a").id}
            assert file.path.read_bytes() == whole[:first]


def test_refuses(tmp_path):
    path = tmp_path / "answers.jsonl"
    file = AnswerFile(path, MADE_BY)
    with file.writing():
        file.append([answer("a")])
        with pytest.raises(StorageError, match="another process"), AnswerFile(path, MADE_BY).writing():
            pass
    other = AnswerFile(path, {**MADE_BY, "seed": 2})
    with pytest.raises(MismatchError, match=r"line 1.*seed was 1 and is now 2"), other.writing():
        pass
    for line in (b"not JSON\n", b'{"prompt_id": "x"}\n', b"[1]\n", b'{"prompt_id": "x", "made_by": 3}\n'):
        path.write_bytes(line)
        with pytest.raises(StorageError, match="line 1: this line is not an answer"), file.writing():
            pass
        assert path.read_bytes() == line
    (tmp_path / "file").write_text("")
    nowhere = AnswerFile(tmp_path / "file" / "answers.jsonl", MADE_BY)
    with pytest.raises(StorageError, match="cannot be written"), nowhere.writing():
        pass


@pytest.mark.parametrize("content", ['{"my": "precious data"}', "precious", "{"])
def test_a_file_of_somebody_else_is_left_alone(tmp_path, content):
    path = tmp_path / "answers.jsonl"
    path.write_text(content)  # no line break at its end, as json.dump writes it
    if content != "{":
        with pytest.raises(StorageError), AnswerFile(path, MADE_BY).writing():
            pass
        assert path.read_text() == content
    else:  # the first letter of a line of ours that was cut
        with AnswerFile(path, MADE_BY).writing() as done:
            assert done == set()
