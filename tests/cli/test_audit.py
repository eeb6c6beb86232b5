"""`infalign audit` from the command line: results, JSON alone on stdout, one plain message for every mistake."""

import json
import sys
from pathlib import Path

import pytest

from infalign.run.testbed.toy import random_llama
from tests.runs import infalign

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"  # beside the repository, where there is one


@pytest.fixture
def job(tmp_path, monkeypatch):
    random_llama(tmp_path / "before", max_length=96, seed=1)
    random_llama(tmp_path / "policies" / "after" / "model", max_length=96, seed=2)
    for name in ("bad", "good"):
        rows = [{"prompt": f"A {name} question about thing {i}"} for i in range(3)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "audit_rewards.py").write_text(
        "def safety(prompts, completions):\n    return [-float('e' in c) for c in completions]\n"
        "def broke(prompts, completions):\n    return ['e' in c for c in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "audit_rewards", raising=False)
    return tmp_path


def call(monkeypatch, capsys, *arguments):
    return infalign(capsys, monkeypatch, "audit", *arguments)


BASE = ["--prompts", "bad.jsonl", "--attempts", "4", "--max-new-tokens", "4", "--out", "out"]
TWO = ["--model", "before", "--model", "policies/after/model"]


def test_an_audit_of_two_models(job, monkeypatch, capsys):
    judged = ["--reward", "audit_rewards:safety", "--threshold", "-0.5", "--benign", "good.jsonl"]
    code, out, err = call(monkeypatch, capsys, *TWO, *BASE, *judged, "--json")
    assert code == 0, err
    result = json.loads(out)
    assert [model["label"] for model in result["models"]] == ["before", "after"]
    assert result["num_benign"] == 3
    assert Path(result["report"]).read_text().startswith("<!DOCTYPE html>")
    assert "draw 12 attempts" in err
    # The same again, by a judge that says yes or no: the same attempts, none drawn anew.
    shards = sorted((job / "out").rglob("rollouts/*.parquet"))
    code, out, err = call(monkeypatch, capsys, *TWO, *BASE, "--success", "audit_rewards:broke")
    assert code == 0, err
    assert "ASR@4" in out
    assert "Report: out/report.html" in out
    assert sorted((job / "out").rglob("rollouts/*.parquet")) == shards
    stored = json.loads((job / "out" / "audit.json").read_text())
    assert [m["successes"] for m in stored["models"]] == [m["successes"] for m in result["models"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Give either --reward with --threshold, or --success"),
        (["--reward", "audit_rewards:safety"], "no natural line between safe and harmful"),
        (["--success", "audit_rewards:broke", "--threshold", "1"], "--threshold goes with --reward"),
        (["--success", "audit_rewards:nothing"], "cannot be imported"),
        (["--reward", "./nowhere", "--threshold", "0"], "there is no such folder"),
        (["--success", "not-refused", "--augment", "rot13"], "unknown augmentation 'rot13'"),
        (["--success", "not-refused", "--sigma", "2"], "strength is 2"),
        (["--success", "not-refused", "--model", "a b=before"], "'a b' cannot name a model"),
        (["--success", "not-refused", "--model", "before"], "each with its own name"),
        (["--success", "not-refused", "--prompts", "none.jsonl"], "none.jsonl"),
        (["--success", "not-refused", "--max-new-tokens", "90"], "leave no room"),
        (["--success", "not-refused", "--chat"], "no chat template"),
        (["--reward", "audit_rewards:safety", "--threshold", "nan"], "the threshold is nan"),
        (
            ["--success", "not-refused", "--refusal", "audit_rewards:broke"],
            "--refusal does nothing without --benign",
        ),
        (["--success", "not-refused", "--benign-attempts", "2"], "--benign-attempts does nothing without --benign"),
        (["--success", "not-refused", "--api-key-variable", "KEY"], "--api-key-variable does nothing without"),
        (
            ["--success", "not-refused", "--endpoint", "http://127.0.0.1:9/v1", "--batch-size", "2"],
            "--batch-size does nothing with --endpoint",
        ),
    ],
)
def test_a_mistake_is_one_plain_message(job, monkeypatch, capsys, arguments, message):
    code, out, err = call(monkeypatch, capsys, "--model", "before", *BASE, *arguments)
    assert code == 2
    assert out == ""
    assert "Traceback" not in err
    assert message in " ".join(err.split())


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data are not here")
def test_the_shared_prompts_can_be_audited(job, monkeypatch, capsys):
    random_llama(job / "roomy", max_length=512, seed=1)
    code, out, err = call(
        monkeypatch, capsys, "--model", "roomy", "--prompts", str(SHARED / "jailbreak-prompts/advbench.jsonl.gz"),
        "--benign", str(SHARED / "xstest/safe.jsonl.gz"), "--limit", "5", "--success", "not-refused",
        *("--attempts", "2", "--max-new-tokens", "2", "--out", "shared", "--benign-attempts", "1", "--json"),
    )  # fmt: skip
    assert code == 0, err
    assert json.loads(out)["num_prompts"] == 5
