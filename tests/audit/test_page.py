"""The audit's report: self-contained, hostile text inert, harmful text closed until it is opened."""

import functools
import html
import json
import re

import numpy as np
import pytest

from infalign.audit.augment import Augmentation
from infalign.audit.page import write_audit_report
from infalign.audit.results import AuditResult
from infalign.audit.run import AuditSettings, Judge, compare_models, measure_model
from infalign.audit.words import cautions, methods_paragraph, text_table, verdict
from infalign.estimators import share_estimate
from infalign.evaluation.results import Measured
from infalign.rewards.source import FunctionReward
from tests.report.browser import needs_browser, opened
from tests.report.example import HOSTILE

SECRET = "needle in the harmful text"


def safe(prompts, completions):
    return [1.0] * len(completions)


@functools.cache
def result(*, shifts=(0.0, 1.0), num_prompts=40, attempts=32, never=False, benign=True):
    rng = np.random.default_rng(0)
    settings = AuditSettings(attempts=attempts)
    judge = Judge(FunctionReward(safe, key=f"judge {HOSTILE}"), -1.5)
    weakness_P1 = rng.normal(size=(num_prompts, 1))
    models = []
    for label, shift in zip(("before", "after"), shifts, strict=False):
        scores_PM = weakness_P1 + shift + rng.normal(size=(num_prompts, attempts)) + (100 if never else 0)
        refused = Measured.of(share_estimate(rng.random(25))) if benign else None
        models.append(measure_model(label, f"model {HOSTILE}", scores_PM, judge, settings, over_refusal=refused))
    return AuditResult(
        judge=str(judge),
        num_prompts=num_prompts,
        num_attempts=attempts,
        num_benign=25 if benign else 0,
        confidence=0.95,
        settings={
            "augmentation": {"ways": list(Augmentation().ways), "sigma": 0.4, "seed": 0},
            "max_new_tokens": 64,
            "benign_attempts": 4,
            "refusal": "refusal-phrases-1",
        },
        prompt_ids=[f"{p:016x}" for p in range(num_prompts)],
        models=models,
        changes=compare_models(models, 0.95),
    )


def examples():
    worst = [
        {"sent": f"sent {HOSTILE}", "text": f"{SECRET} {HOSTILE}", "score": -2.0, "success": True, "attempt": 3},
        {"sent": "sent", "text": "", "score": 1.0, "success": False, "attempt": 0},
    ]
    return [
        {
            "prompt": f"prompt {p} {HOSTILE}",
            "models": [{"label": label, "broken": 3, "of": 32, "worst": worst} for label in ("before", "after")],
        }
        for p in range(25)
    ]


def write(path, found=None, shown=None):
    return write_audit_report(
        path / "report.html",
        found or result(),
        examples() if shown is None else shown,
        title=f"Title {HOSTILE}",
        versions={"infalign": "0.1.0"},
    )


def test_the_page_asks_the_network_for_nothing_and_keeps_text_as_text(tmp_path):
    page = write(tmp_path).read_text()
    assert "<img src=x" not in page
    assert "default-src 'none'" in page
    head = page[: page.index("<script")]
    assert not re.search(r'(?:src|href)="(?!#|data:)', head)
    assert "{{ 7*7 }}" in page
    assert SECRET not in head, "harmful text is nowhere in the page's own words"
    data = json.loads(re.search(r'<script type="application/json" id="examples-data">(.*?)</script>', page, re.S)[1])
    assert data[0]["models"][0]["worst"][0]["text"].startswith(SECRET)
    assert len(page) < 10_000_000


@pytest.mark.parametrize("found", [{"never": True}, {"shifts": (0.0,)}, {"attempts": 2}, {"benign": False}])
def test_every_kind_of_result_has_a_page(tmp_path, found):
    page = write(tmp_path, result(**found), shown=[]).read_text()
    words = page[: page.index("<script")]
    assert 'id="examples"' not in words
    assert ("only an upper bound is known" in words) == ("never" in found)
    assert ("Too few attempts" in words) == ("attempts" in found)
    assert ("No benign prompts were asked" in words) == ("benign" in found)


def test_words():
    found = result()
    sentences = " ".join(finding.sentence for finding in verdict(found))
    first = found.models[0]
    assert f"{100 * first.at[0].success.estimate:.1f}%" in sentences
    assert "ASR@1: after is lower than before" in sentences
    assert all(change.safer for change in found.changes if change.what.startswith("ASR"))
    assert "32 responses" in methods_paragraph(found)
    assert "usual English phrases" in " ".join(cautions(found))
    table = text_table(found)
    assert "ASR@32" in table
    assert "ASR@512 predicted (bounds)" in table
    assert AuditResult.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_one_is_singular_everywhere(tmp_path):
    found = result(num_prompts=1, attempts=1)
    page = write(tmp_path, found, shown=[]).read_text()
    text = "\n".join([text_table(found), methods_paragraph(found), *cautions(found), page[: page.index("<script")]])
    assert "1 prompt × 1 attempt per model" in text
    assert "There is only 1 prompt." in text
    assert not re.search(r"\b1 ([\w-]+ )*(prompts|attempts|responses)\b", text)


@needs_browser
def test_in_a_browser_examples_open_on_demand(tmp_path):
    script = """addEventListener("load", () => setTimeout(async () => {
      const wait = async (test) => { while (!test()) await new Promise((done) => setTimeout(done, 20)); };
      await wait(() => document.documentElement.dataset.ready);
      const list = document.getElementById("example-list");
      const before = document.body.innerText.includes("needle");
      const shown = list.querySelectorAll("details.sample").length;
      list.querySelector("details.sample").open = true;
      await wait(() => list.querySelector(".answer"));
      document.body.dataset.probe = JSON.stringify({
        before, shown, after: list.querySelector(".answer").textContent.includes("needle"),
        images: document.querySelectorAll("img").length, title: document.title.startsWith("Title <\\/script>"),
      });
    }, 50));"""
    dom, console = opened(write(tmp_path), tmp_path, script)
    assert console == []
    assert dom.count('class="main-svg"') >= 2
    probe = json.loads(html.unescape(re.search(r'data-probe="([^"]*)"', dom)[1]))
    assert probe == {"before": False, "shown": 10, "after": True, "images": 0, "title": True}
