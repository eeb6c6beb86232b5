"""Small parts of sentences."""

import json

from infalign._io.wording import counted, distinct, json_text, visible


def test_one_is_singular_and_nothing_else_is():
    assert [counted(n, "prompt") for n in (0, 1, 2, 12_000)] == ["0 prompts", "1 prompt", "2 prompts", "12,000 prompts"]
    assert counted(2, "reply", "replies") == "2 replies"


def test_control_characters_are_written_out():
    assert visible("f(x) :x: [b] \x1b[31m\x07\r é\t🎉\n\x9b") == "f(x) :x: [b] \\x1b[31m\\x07\\x0d é\t🎉\n\\x9b"


def test_characters_that_reorder_or_hide_text_are_written_out():
    for mark in (*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C, 0x2028, 0xE0041, 0xD83D):
        assert visible(f"a{chr(mark)}b") == f"a⟨U+{mark:04X}⟩b"
    kept = "עברית العربية 👩\u200d👧 e\u0301 日本"
    assert visible(kept) == kept
    assert visible(visible("\u202e")) == "⟨U+202E⟩"


def test_json_for_a_terminal_is_the_same_json():
    text = "a\u202eb\x9b\x1b\x7f\ud83dé日\U000e0041"
    shown = json_text({"text": text})
    assert json.loads(shown) == {"text": text}
    assert visible(shown) == shown
    assert "é日" in shown


def test_names_that_come_again_get_a_number():
    assert distinct(["a", "b", "a", "a"]) == ["a", "b", "a (2)", "a (3)"]
    assert distinct(["a", "a (2)", "a"]) == ["a", "a (2)", "a (3)"]
    assert distinct([]) == []
