"""Small parts of sentences."""

from infalign.wording import counted, distinct, visible


def test_one_is_singular_and_nothing_else_is():
    assert [counted(n, "prompt") for n in (0, 1, 2, 12_000)] == ["0 prompts", "1 prompt", "2 prompts", "12,000 prompts"]
    assert counted(2, "reply", "replies") == "2 replies"


def test_control_characters_are_written_out():
    assert visible("f(x) :x: [b] \x1b[31m\x07\r é\t🎉\n\x9b") == "f(x) :x: [b] \\x1b[31m\\x07\\x0d é\t🎉\n\\x9b"


def test_names_that_come_again_get_a_number():
    assert distinct(["a", "b", "a", "a"]) == ["a", "b", "a (2)", "a (3)"]
    assert distinct(["a", "a (2)", "a"]) == ["a", "a (2)", "a (3)"]
    assert distinct([]) == []
