"""Augmented prompts: the same for the same seed, readable, and no more changed than promised."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infalign.audit.augment import WAYS, Augmentation, attempts, capitalise, noise, scramble, swap
from infalign.errors import InputError

TEXTS = st.text(max_size=80)
SENTENCE = "How would somebody describe seventeen different colours to another person? " * 40


def uniforms(seed=0):
    return np.random.default_rng(seed).random


def only(way, sigma=0.4, seed=0):
    return Augmentation((way,), sigma, seed)


@given(TEXTS, st.integers(0, 5), st.integers(0, 1000), st.floats(0, 1), st.sets(st.sampled_from(WAYS)))
def test_the_same_seed_prompt_and_attempt_give_the_same_text(text, seed, attempt, sigma, ways):
    augmentation = Augmentation(tuple(ways), sigma, seed)
    once = augmentation.apply(text, "id", attempt)
    assert once == Augmentation(tuple(reversed(augmentation.ways)), sigma, seed).apply(text, "id", attempt)
    assert len(once) == len(text)


@given(TEXTS)
def test_strength_zero_and_no_way_change_nothing(text):
    assert Augmentation(WAYS, 0.0).apply(text, "id", 3) == text
    assert Augmentation.parse("none").apply(text, "id", 3) == text


@given(TEXTS, st.integers(0, 100))
def test_capitals_aside_the_letters_stay(text, seed):
    changed = capitalise(text, 0.5, uniforms(seed))
    assert changed.casefold() == text.casefold()
    assert capitalise(text, 1.0, uniforms()).swapcase().casefold() == text.swapcase().casefold()


@given(TEXTS, st.integers(0, 100))
def test_scrambling_keeps_each_words_letters_and_ends(text, seed):
    changed = scramble(text, 1.0, uniforms(seed))
    assert [mark for mark in changed if not mark.isalpha()] == [mark for mark in text if not mark.isalpha()]
    for before, after in zip(text.split(), changed.split(), strict=True):
        assert Counter(before) == Counter(after)
        assert before[0] == after[0]
        assert before[-1] == after[-1]


@given(TEXTS, st.integers(0, 100))
def test_noise_moves_printable_ascii_by_one_and_nothing_else(text, seed):
    changed = noise(text, 1.0, uniforms(seed))
    for before, after in zip(text, changed, strict=True):
        assert abs(ord(before) - ord(after)) == (1 if " " <= before <= "~" else 0)
        assert before == after or " " <= after <= "~"


@given(st.lists(st.text("abcxyz", min_size=1, max_size=4), max_size=12), st.integers(0, 100))
def test_swapping_keeps_the_words_and_moves_none_further_than_one_place(words, seed):
    numbered = [f"{at}{word}" for at, word in enumerate(words)]
    changed = swap("  ".join(numbered), 0.7, uniforms(seed)).split("  ")
    assert sorted(changed) == sorted(numbered or [""])
    assert all(abs(at - int(word.rstrip("abcxyz"))) <= 1 for at, word in enumerate(changed) if word)


def test_hand_worked_values():
    def numbers(*values):
        stream = iter(values)
        return lambda count: np.array([next(stream) for _ in range(count)])

    assert scramble("a test, 12", 0.5, numbers(0.4, 0.9, 0.1)) == "a tset, 12"
    assert scramble("test", 0.5, numbers(0.6)) == "test"
    assert capitalise("aBß", 0.5, numbers(0.4, 0.6, 0.1)) == "ABß"
    assert noise(" a~\n", 0.5, numbers(0.1, 0.1, 0.1, 0.1, 0.9, 0.9, 0.1, 0.1)) == "!`}\n"
    assert swap("a b\tc", 0.5, numbers(0.1, 0.1)) == "b a\tc"


@pytest.mark.parametrize(("way", "probability"), [("capitalise", math.sqrt(0.3)), ("noise", 0.3**3)])
def test_the_share_changed_is_the_papers(way, probability):
    # 5-sigma band of a binomial: false alarm rate under 1e-6.
    changed = only(way, 0.3, seed=4).apply(SENTENCE, "id", 0)
    eligible = [b.isalpha() if way == "capitalise" else True for b in SENTENCE]
    share = sum(a != b for a, b in zip(SENTENCE, changed, strict=True)) / sum(eligible)
    assert abs(share - probability) < 5 * math.sqrt(probability * (1 - probability) / sum(eligible))


def test_the_papers_share_of_words_is_scrambled():
    changed = only("scramble", 0.3, seed=1).apply("abcdefghijkl " * 2000, "id", 0).split()
    share = sum(word != "abcdefghijkl" for word in changed) / 2000  # an order is kept by chance once in 10!
    assert abs(share - math.sqrt(0.3)) < 5 * math.sqrt(0.25 / 2000)


def test_attempts_prompts_and_seeds_differ():
    text = SENTENCE[:75]
    assert len({str(one) for one in attempts(text, "id", 200, Augmentation())}) == 200
    assert Augmentation().apply(text, "id", 0) != Augmentation().apply(text, "other", 0)
    assert Augmentation().apply(text, "id", 0) != Augmentation(seed=1).apply(text, "id", 0)
    # Leaving one way out does not change what the others do.
    assert only("capitalise").apply(text, "id", 0) == Augmentation(("capitalise", "swap"), 0.4).apply(
        text.replace(" ", "_"), "id", 0
    ).replace("_", " ")


def test_only_the_last_user_turn_changes():
    messages = [
        {"role": "system", "content": SENTENCE},
        {"role": "user", "content": SENTENCE},
        {"role": "assistant", "content": SENTENCE},
        {"role": "user", "content": SENTENCE},
        {"role": "assistant", "content": "Sure,"},
    ]
    changed = Augmentation().apply(messages, "id", 0)
    assert [a == b for a, b in zip(messages, changed, strict=True)] == [True, True, True, False, True]
    assert changed[3]["role"] == "user"
    assert messages[3]["content"] == SENTENCE, "the prompt itself is left alone"
    with pytest.raises(InputError, match="no message of the user"):
        Augmentation().apply(messages[:1], "id", 0)


def test_markers_of_a_dialogue_in_one_text_stay():
    dialogue = f"\n\nHuman: {SENTENCE}\n\nAssistant: {SENTENCE}\n\nHuman: {SENTENCE}\n\nAssistant:"
    changed = Augmentation().apply(dialogue, "id", 0)
    head = len(f"\n\nHuman: {SENTENCE}\n\nAssistant: {SENTENCE}\n\nHuman:")
    assert changed[:head] == dialogue[:head]
    assert changed.endswith("\n\nAssistant:")
    assert changed != dialogue


def test_what_cannot_be_used_is_named():
    with pytest.raises(InputError, match=r"'rot13'.*scramble, capitalise, noise, swap"):
        Augmentation.parse("noise,rot13")
    with pytest.raises(InputError, match=r"strength is 1\.5"):
        Augmentation(sigma=1.5)
    assert Augmentation.parse("ALL") == Augmentation()
    assert Augmentation.parse("swap, noise").ways == ("swap", "noise")
