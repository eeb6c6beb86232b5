"""The table for a terminal says what was measured, and no more."""

import re

import numpy as np

from infalign.evaluation.compare import compare
from infalign.evaluation.measure import measure
from infalign.procedures import BestOfN, Standard, WorstOfN
from infalign.report.table import text_table
from infalign.report.words import cautions, markdown_table, methods_paragraph

PROCEDURES = [Standard(), BestOfN(2), BestOfN(4), WorstOfN(2), WorstOfN(4)]


def results(shift: float):
    rng = np.random.default_rng(0)
    ref = rng.standard_normal((30, 8))
    ratios = np.full((30, 8), 0.4) + 0.1 * rng.standard_normal((30, 8))
    return [
        measure("ours", rng.standard_normal((30, 8)) + shift, ref, ratios, PROCEDURES),
        measure("theirs", rng.standard_normal((30, 8)) + 0.5, ref, ratios, PROCEDURES),
    ]


def table(shift: float) -> str:
    measured = results(shift)
    stored = [comparison.to_dict() for comparison in compare(measured, baseline="theirs")]
    return text_table(measured, stored, 4, 0.5)


def test_columns_line_up_and_hold_the_headline_procedures():
    lines = table(0.5).splitlines()
    header = next(line for line in lines if "KL (nats)" in line)
    assert "Best-of-4 (limit)" in header
    assert "Best-of-2" not in header
    column = header.index("Standard")
    rows = [line for line in lines if line.startswith(("reference", "ours", "theirs"))]
    assert len(rows) == 3
    assert all(row[column - 1] == " " and row[column] != " " for row in rows)


def test_gold_rewards_have_a_table_of_their_own():
    rng = np.random.default_rng(0)
    ours, theirs, gold, ref_gold = rng.standard_normal((4, 20, 4))
    measured = [measure("ours", ours, theirs, np.ones((20, 4)), [Standard()], judges={"strict": (gold, ref_gold)})]
    lines = text_table(measured, [], 1, None).splitlines()
    row = lines[lines.index("Judged by strict, which training never saw:") + 2]
    assert row.split()[:2] == ["ours", f"{100 * measured[0].of('Standard').judged['strict'].estimate:.1f}"]


def test_prompts_are_called_held_out_only_where_they_are():
    rng = np.random.default_rng(0)
    one = measure("ours", *rng.standard_normal((2, 1, 4)), np.ones((1, 4)), [Standard()], reward="judge")
    assert "1 held-out prompt × 4 fresh rollouts per model" in text_table([one], [], 1, None)
    seen = text_table([one], [], 1, None, held_out=False)
    assert "; 1 prompt × 4 fresh rollouts per model" in seen
    assert "held-out" not in seen


def test_one_is_singular_everywhere():
    rng = np.random.default_rng(0)
    one = measure("ours", *rng.standard_normal((2, 1, 1)), np.ones((1, 1)), [Standard()], reward="judge")
    text = "\n".join(
        [text_table([one], [], 1, None), methods_paragraph([one], None), *cautions([one]), markdown_table([one])]
    )
    assert "1 held-out prompt × 1 fresh rollout per model" in text
    assert "On 1 held-out prompt we drew 1 fresh response" in text
    assert not re.search(r"\b1 ([\w-]+ )*(prompts|rollouts|responses)\b", text)


def test_it_states_the_kl_reached_against_the_budget():
    # 240 log-ratios of mean 0.4 and spread 0.1, seeded.
    assert re.search(r"KL budget 0\.5 nats; reached: ours 0\.(39|40)\d \(-2\d%\)", table(0.5))


def test_a_difference_within_the_noise_is_called_unresolved_and_a_large_one_is_not():
    assert "not resolved whether ours differs from theirs" in table(0.5)
    clear = table(2.5)
    assert "not resolved" not in clear
    assert "ours" in clear
