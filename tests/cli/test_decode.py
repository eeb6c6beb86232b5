"""`infalign decode`: answers on a terminal, in a file, through an endpoint; stopped and gone on; what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from infalign.run.testbed.toy import random_llama
from tests.decode.test_remote import Server, numbers
from tests.runs import infalign

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")

REWARDS = """
import time

def length(prompts, completions):
    return [float(len(c)) for c in completions]

def slow(prompts, completions):
    time.sleep(0.15)
    return length(prompts, completions)

def number(prompts, completions):
    return [float(c if isinstance(c, str) else c[-1]["content"]) for c in completions]

def not_seven(prompts, completions):
    return [None if p == "Number 7: " else float(len(c)) for p, c in zip(prompts, completions)]

def graded(prompts, completions, answer):
    return [float(len(c)) for c in completions]
"""


@pytest.fixture
def job(tmp_path, monkeypatch):
    random_llama(tmp_path / "model", None, hidden_size=16)
    rows = [json.dumps({"prompt": f"Number {i}: "}) for i in range(24)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows) + "\n")
    (tmp_path / "decode_rewards.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "decode_rewards", raising=False)
    return tmp_path


def decode(capsys, monkeypatch, *arguments):
    return infalign(capsys, monkeypatch, "decode", *arguments)


LOCAL = ("--model", "model", "--reward", "decode_rewards:length", "--max-new-tokens", 6, "--n", 4)


def rows_of(path):
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def answers_of(rows):
    return {row["prompt_id"]: {name: value for name, value in row.items() if name != "seconds"} for row in rows}


def test_one_prompt(job, capsys, monkeypatch):
    code, out, _ = decode(capsys, monkeypatch, "Hello", *LOCAL, "--json")
    assert code == 0
    told = json.loads(out)
    (answer,) = told["answers"]
    assert len(answer["candidates"]) == 4
    assert answer["response"] == answer["candidates"][answer["chosen"]]["text"]
    assert answer["reward"] == max(one["reward"] for one in answer["candidates"]) == len(answer["response"])
    assert told["num_tokens"] == sum(one["num_tokens"] for one in answer["candidates"])
    code, out, err = decode(capsys, monkeypatch, "Hello", *LOCAL)
    assert code == 0
    assert answer["response"] in out
    assert f"Best-of-4 · reward {answer['reward']:g}" in out
    assert "4 candidates" in out
    assert "Traceback" not in err


def test_killed_and_started_again_it_gives_the_same_answers(job, capsys, monkeypatch):
    """SIGKILL in the middle, a line cut short, another batch size: every prompt once, and as if never stopped."""
    assert decode(capsys, monkeypatch, "--prompts", "prompts.jsonl", *LOCAL, "--out", "whole.jsonl")[0] == 0
    whole = rows_of(job / "whole.jsonl")
    assert [row["prompt"] for row in whole] == [f"Number {i}: " for i in range(24)]
    arguments = ("--prompts", "prompts.jsonl", *LOCAL, "--out", "killed.jsonl", "--reward", "decode_rewards:slow")
    command = [sys.executable, "-m", "infalign", "decode", *map(str, arguments), "--batch", "1"]
    with open(job / "log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=job)
    file = job / "killed.jsonl"
    deadline = time.monotonic() + 120
    while not (file.exists() and file.read_bytes().count(b"\n") >= 5):
        assert process.poll() is None, (job / "log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    there = file.read_bytes().count(b"\n")
    assert 5 <= there < 24
    with file.open("ab") as cut:
        cut.write(b'{"prompt_id": "half a li')
    code, out, _ = decode(capsys, monkeypatch, *arguments, "--batch", 7)
    assert code == 0
    assert f"{24 - there} prompts answered; {there} were there" in out
    rows = rows_of(file)
    assert len(rows) == 24
    for row in (*rows, *whole):
        del row["made_by"]  # the rewards have two names, and the same values
    assert answers_of(rows) == answers_of(whole)
    # Once more there is nothing to do; made otherwise, the file is refused and stays as it is.
    before = file.read_bytes()
    assert json.loads(decode(capsys, monkeypatch, *arguments, "--json")[1])["answered_before"] == 24
    for changed, message in ((("--seed", 1), "seed was 0 and is now 1"), (("--n", 2), "procedure was")):
        code, _, err = decode(capsys, monkeypatch, *arguments, *changed)
        assert code == 2
        assert message in err.replace("\n", " ")
    assert file.read_bytes() == before


def test_a_prompt_that_cannot_be_ranked_is_said_and_the_others_are_kept(job, capsys, monkeypatch):
    arguments = ("--prompts", "prompts.jsonl", *LOCAL, "--reward", "decode_rewards:not_seven", "--out", "out.jsonl")
    code, out, err = decode(capsys, monkeypatch, *arguments)
    assert code == 2
    assert "1 of 24 prompts has no answer; the first:" in err.replace("\n", " ")
    assert "23 prompts answered" in out
    assert len(rows_of(job / "out.jsonl")) == 23


@pytest.mark.parametrize("prompts", [("Hi",), ("--prompts", "prompts.jsonl")])
def test_where_nothing_could_be_answered_nobody_is_told_that_it_is_done(job, capsys, monkeypatch, prompts):
    arguments = (*prompts, *LOCAL, "--reward", "decode_rewards:number", "--batch", 4)  # no response is a number
    code, out, err = decode(capsys, monkeypatch, *arguments, "--json")
    assert code == 2
    assert json.loads(out)["answered"] == 0
    assert "Best-of-4 …" in err
    assert "done" not in err


def test_an_endpoint_and_stopping_at_a_reward(job, capsys, monkeypatch):
    with Server(numbers) as server:
        arguments = ("--endpoint", server.url, "--model-name", "toy", "--reward", "decode_rewards:number",
                     "--prompts", "prompts.jsonl", "--chat", "--procedure", "best-of-8", "--json")  # fmt: skip
        code, out, _ = decode(capsys, monkeypatch, *arguments, "--stop-reward", 0.5)
    assert code == 0
    told = json.loads(out)
    assert told["candidates"] < 24 * 4  # two on average; four would be a dozen standard errors away
    for answer in told["answers"]:
        assert answer["prompt"][0]["role"] == "user"
        *before, last = [one["reward"] for one in answer["candidates"]]
        assert all(one < 0.5 for one in before)
        assert last >= 0.5 or len(before) == 7


def test_rejecting_candidates_part_way(job, capsys, monkeypatch):
    code, out, err = decode(capsys, monkeypatch, "Hello", *LOCAL, "--prune-every", 2, "--json")
    assert code == 0, err
    (answer,) = json.loads(out)["answers"]
    reasons = [one["finish_reason"] for one in answer["candidates"]]
    assert "rejected" in reasons
    assert reasons[answer["chosen"]] != "rejected"


RECIPE = """
name: demo
policy: {model: model}
reward: {function: "decode_rewards:length"}
prompts: {source: prompts.jsonl, train: 6, evaluation: 4, held_out: 0.5}
rollouts: {num_ref: 8, max_new_tokens: 6}
kl_budget: 0.2
"""


def test_a_calibration_gives_quantiles_and_lets_it_stop(job, capsys, monkeypatch):
    (job / "recipe.yaml").write_text(RECIPE)
    for verb in ("rollout", "calibrate"):
        code, _, err = infalign(capsys, monkeypatch, verb, "recipe.yaml", "--out", "run")
        assert code == 0, err
    arguments = (
        "--model",
        "model",
        "--max-new-tokens",
        6,
        "--calibration",
        "run",
        "--trust-run",
        "--procedure",
        "best-of-8",
        "--json",
    )
    (known, *_) = [json.loads(line)["prompt"] for line in (job / "run/prompts/train.jsonl").read_text().splitlines()]
    capsys.readouterr()
    code, out, err = decode(capsys, monkeypatch, known, *arguments, "--stop-at", 0.5)
    assert code == 0, err
    (answer,) = json.loads(out)["answers"]
    *before, last = [one["calibrated_reward"] for one in answer["candidates"]]
    assert all(one < 0.5 for one in before)
    assert last >= 0.5 or len(before) == 7
    # A prompt without references can be answered, but not be stopped by a quantile.
    (answer,) = json.loads(decode(capsys, monkeypatch, "Unknown", *arguments)[1])["answers"]
    assert answer["calibrated_reward"] is None
    code, _, err = decode(capsys, monkeypatch, "Unknown", *arguments, "--stop-at", 0.5)
    assert code == 2
    assert "no reference rewards" in err.replace("\n", " ")
    code, _, err = decode(capsys, monkeypatch, known, *arguments, "--reward", "decode_rewards:slow")
    assert code == 2
    assert "the calibration was made with" in err.replace("\n", " ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--n", 4, "--model", "model", "--reward", "decode_rewards:length"), "nothing to answer"),
        (("Hi", "--prompts", "prompts.jsonl", "--n", 4, "--model", "model"), "nothing to answer, or twice"),
        (("Hi", "--n", 4, "--reward", "decode_rewards:length"), "one model is needed"),
        (("Hi", "--n", 4, "--endpoint", "http://127.0.0.1:9/v1"), "--model-name"),
        (("Hi", "--model", "model"), "needs the number of responses"),
        (("Hi", "--model", "model", "--n", 4), "needs a reward"),
        (("Hi", "--model", "model", "--n", 4, "--reward", "decode_rewards:nothing"), "cannot be imported"),
        (("Hi", "--model", "model", "--n", 4, "--reward", "./absent"), "there is no such folder"),
        (("Hi", "--model", "model", "--n", 4, "--reward", "decode_rewards:graded"), "'answer'"),
        (("Hi", "--model", "./absent", "--n", 4, "--reward", "decode_rewards:length"), "absent"),
        (("Hi", *LOCAL, "--stop-at", 0.9), "there is no calibration"),
        (("Hi", *LOCAL, "--stop-at", 1.5), "stop_at = 1.5"),
        (("Hi", *LOCAL, "--procedure", "worst-of-n", "--stop-at", 0.9), "for Best-of-N"),
        (("Hi", *LOCAL, "--prune-every", 2, "--prune-keep", 0), "keep is 0"),
        (("Hi", *LOCAL, "--prune-every", 2, "--procedure", "worst-of-n"), "only Best-of-N"),
        (("Hi", *LOCAL, "--prune-keep", 0.2), "--prune-keep goes with --prune-every"),
        (("Hi", *LOCAL, "--block", 2), "--block goes with --stop-at or --stop-reward"),
        (("Hi", *LOCAL, "--calibration", "absent"), "there is no such folder"),
        (("Hi", *LOCAL, "--temperature", 0), "temperature"),
        (("Hi", *LOCAL, "--chat"), "no chat template"),
        (("Hi" * 100, *LOCAL), "no room"),
        (("--prompts", "absent.jsonl", *LOCAL), "absent.jsonl"),
        (("--prompts", "prompts.jsonl", "--column", "text", *LOCAL), "there is no column 'text'"),
        (("Hi", *LOCAL, "--column", "text"), "--column does nothing without --prompts"),
        (("Hi", *LOCAL, "--limit", 3), "--limit does nothing without --prompts"),
        (("Hi", *LOCAL, "--concurrency", 3), "--concurrency does nothing without --endpoint"),
        (("Hi", *LOCAL, "--api-key-variable", "KEY"), "--api-key-variable does nothing without --endpoint"),
    ],
)
def test_what_a_user_can_mend_is_one_message_and_exit_code_2(job, capsys, monkeypatch, arguments, message):
    code, out, err = decode(capsys, monkeypatch, *arguments)
    assert code == 2
    assert out == ""
    assert message in err.replace("\n", " ")
    assert "Traceback" not in err
    assert err.count("error:") == 1


def test_rows_that_repeat_a_prompt_are_said_to_be_left_out(job, capsys, monkeypatch):
    (job / "twice.jsonl").write_text('{"prompt": "Hi"}\n{"prompt": "Hi"}\n')
    code, out, err = decode(capsys, monkeypatch, "--prompts", "twice.jsonl", *LOCAL, "--json")
    assert code == 0, err
    assert json.loads(out)["answered"] == 1
    assert "1 row of twice.jsonl repeats a prompt and is left out" in err
