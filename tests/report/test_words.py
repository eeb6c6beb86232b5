"""Sentences of the report: verdicts, warnings, methods, and tables of text."""

import dataclasses

import numpy as np

from infalign.estimators import mean_estimate
from infalign.evaluation.results import Measured
from infalign.report.page import markdown_table
from infalign.report.words import captured_cell, cautions, methods_paragraph, share_of_gain, unmoved, verdict
from tests.report.example import method, two_methods


class TestWords:
    def test_verdict_is_honest_about_nothing(self):
        same = method("same", 0.0)
        (finding,) = verdict([same], "Best-of-4", [])
        assert not finding.resolved
        assert "not resolved whether same differs from the reference" in finding.sentence

    def test_many_methods_are_many_chances(self):
        # One method at p ≈ 0.03 is resolved alone, and not among ten that differ in nothing.
        rng = np.random.default_rng(0)
        noise = rng.normal(size=60)
        noise = (noise - noise.mean()) / noise.std(ddof=1)
        wins = (0.5 + 0.1 * (noise + 2.2 / np.sqrt(60))).tolist()
        base = method("a", 0.0)
        entry = base.of("Best-of-4")
        edge = dataclasses.replace(entry, win_rate=Measured.of(mean_estimate(wins)))
        one = dataclasses.replace(base, procedures=[edge])
        others = [dataclasses.replace(method(str(i), 0.0), procedures=[entry]) for i in range(9)]
        assert verdict([one], "Best-of-4", [])[0].resolved
        assert not any(finding.resolved for finding in verdict([one, *others], "Best-of-4", []))

    def test_verdict_of_a_worse_model(self):
        (finding,) = verdict([method("worse", -0.8)], "Best-of-4", [])
        assert finding.resolved
        assert "worse loses to the reference" in finding.sentence

    def test_cautions_follow_the_data(self):
        plain = " ".join(cautions([two_methods()[0]]))
        assert "aware, Best-of-4: by gold the win rate is" in plain
        assert "longer" not in plain
        assert "ties" not in plain
        warned = dataclasses.replace(
            two_methods()[0], tie_share=0.2, mean_length=24.0, ref_mean_length=20.0, truncated_share=0.1, num_prompts=12
        )
        text = " ".join(cautions([warned]))
        for part in (
            "20% longer",
            "20% of the pairs are ties",
            "10.0% of the responses were cut off",
            "only 12 prompts",
        ):
            assert part in text

    def test_a_policy_that_hardly_moved_is_said_to_have_not_moved(self):
        still = dataclasses.replace(method("still", 0.5), kl=Measured(0.02, 0.02, -0.02, 0.06, [0.0, 0.04]))
        assert not still.moved
        assert "hardly moved" in unmoved(still)
        assert any("hardly moved" in caution for caution in cautions([still]))
        table = markdown_table([still])
        assert "limit at that KL" not in table
        assert "hardly moved" in table
        entry = dataclasses.replace(still.procedures[0], captured=None)
        assert (share_of_gain(entry), captured_cell(still, entry)) == ("", "hardly moved")
        assert unmoved(method("moved", 0.8)) is None

    def test_no_reader_sees_a_negative_share_of_a_gain(self):
        entry = dataclasses.replace(
            method("a", 0.8).procedures[0], limit=0.52, captured=Measured(-2.73, 1.0, -4.7, -0.8, [-2.73])
        )
        assert share_of_gain(entry) == "none of the gain at the limit (52.0%)"
        assert captured_cell(method("a", 0.8), entry) == "none"

    def test_methods_paragraph_states_sizes(self):
        text = methods_paragraph([two_methods()[0]], {"best": {"kl": 0.5, "beta": 0.2}})
        assert "60 held-out prompts we drew 8 fresh responses" in text
        assert "KL of 0.5 nats (β = 0.2 in theory)" in text

    def test_markdown_table(self):
        aware, plain = two_methods()
        odd = dataclasses.replace(aware, label="a|b\n<i>")
        text = markdown_table([odd, plain], procedures=["Best-of-4"])
        lines = text.splitlines()
        assert lines[0] == "| method | KL, nats | Best-of-4 win rate |"
        assert lines[2].startswith("| a\\|b \\<i\\> |")
        assert all(line.replace("\\|", "").count("|") == 4 for line in lines[:5])
        assert "limit at that KL" in lines[4]
