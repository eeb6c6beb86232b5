import ast
import json
from collections import Counter
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infalign.errors import InputError
from infalign.run.testbed.docstrings import (
    KINDS,
    MAX_PROMPT_LENGTH,
    MAX_WORDS,
    MIN_WORDS,
    docstring_examples,
    first_sentence,
    preference_pairs,
    render_prompt,
)
from infalign.run.testbed.examples import Example


@pytest.fixture(scope="module")
def examples():
    return docstring_examples()


def _function(source):
    node = ast.parse(source).body[0]
    assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    return node


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("Return the value.", "Return the value."),
        ("Return the value", "Return the value."),
        ("Return the\n   value. And more.", "Return the value."),
        ("Return ``x`` as `text`.\n\nNot this.", "Return x as text."),
        ("Use e.g. This one.  Next", "Use e.g. This one."),
        ("Divide 1.5 by two.", "Divide 1.5 by two."),
        ("Is it true? Yes.", "Is it true?"),
        ("Split (on blanks)", "Split (on blanks)."),
        ("Too short.", None),
        (" ".join(["word"] * (MAX_WORDS + 1)), None),
        ("The values are:", None),
        ("S.find(sub) -> int", None),
        ("Café au lait.", None),
        ("", None),
    ],
)
def test_first_sentence(docstring, sentence):
    assert first_sentence(docstring) == sentence


@given(st.text(max_size=200))
def test_first_sentence_is_plain_or_nothing(text):
    sentence = first_sentence(text)
    if sentence is not None:
        assert MIN_WORDS <= len(sentence.split()) <= MAX_WORDS
        assert sentence == " ".join(sentence.split())
        assert sentence[-1] in ".!?"
        assert sentence.isascii()


@pytest.mark.parametrize(
    ("source", "prompt"),
    [
        ("def f(): ...", "m.f()\n"),
        ("def f(self, a: int, b: str = 'x') -> int: ...", "m.f(a, b='x')\n"),
        ("def f(a, /, b, *, c, d=1): ...", "m.f(a, b, *, c, d=1)\n"),
        ("async def f(cls, *args, key=None, **kwargs): ...", "m.f(*args, key=None, **kwargs)\n"),
        ("def f(a=(1, 2, 3, 4, 5, 6)): ...", "m.f(a=...)\n"),
        ("def f(a, b, c, d, e, g): ...", "m.f(a, b, c, d, e, ...)\n"),
        (f"def f(a, {'b' * 100}): ...", "m.f(a, ...)\n"),
    ],
)
def test_render_prompt(source, prompt):
    assert render_prompt("m.f", _function(source)) == prompt


def test_reads_public_documented_functions_only(tmp_path):
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "__init__.py").write_text(
        "import does_not_exist\n"  # read, never imported
        "def shown(a):\n    'Return one shown thing.'\n"
        "def _hidden(a):\n    'Return one hidden thing.'\n"
        "def silent(a): ...\n"
        "def twin(a):\n    'Return one SHOWN thing.'\n"
        "class C:\n    def method(self):\n        'Do one more thing.'\n"
        "        def inner():\n            'Is hidden in here.'\n"
        "class _P:\n    def method(self):\n        'Do a private thing.'\n"
        "if True:\n    async def later(x=1):\n        'Wait for it here.'\n"
    )
    (tmp_path / "_private.py").write_text("def f():\n    'Return a private thing.'\n")
    (tmp_path / "_pytwin.py").write_text("def f():\n    'Return a public thing.'\n")
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "a.py").write_text("def f():\n    'Return a tested thing.'\n")
    found = docstring_examples(tmp_path)
    assert [(e.source, e.prompt, e.completion) for e in found] == [
        ("pkg.C.method", "pkg.C.method()\n", "Do one more thing."),
        ("pkg.later", "pkg.later(x=1)\n", "Wait for it here."),
        ("pkg.shown", "pkg.shown(a)\n", "Return one shown thing."),
        ("twin.f", "twin.f()\n", "Return a public thing."),
    ]


def test_nothing_found_is_an_error(tmp_path):
    with pytest.raises(InputError, match="no documented public function"):
        docstring_examples(tmp_path)


def test_standard_library(examples):
    assert len(examples) > 1500
    sources = [e.source for e in examples]
    assert sources == sorted(set(sources))
    assert "textwrap.dedent" in sources
    assert max(len(e.prompt) for e in examples) <= MAX_PROMPT_LENGTH + 1
    assert all(e.prompt.startswith(e.source + "(") and e.prompt.endswith(")\n") for e in examples)
    assert all(json.loads(json.dumps(asdict(e))) == asdict(e) for e in examples)
    share = sum(e.held_out for e in examples) / len(examples)
    assert 0.21 < share < 0.28  # the hash is fixed: this moves only with the Python version
    completions = [e.completion.casefold() for e in examples]
    assert len(set(completions)) == len(completions)  # so none is in both parts


def test_split_does_not_depend_on_the_other_examples(examples, tmp_path):
    for example in [e for e in examples if e.source.count(".") == 1][:40]:
        module, name = example.source.split(".")
        (tmp_path / f"{module}.py").write_text(f"def {name}():\n    'Return the same thing.'\n")
        (found,) = docstring_examples(tmp_path)
        assert found.held_out == example.held_out
        (tmp_path / f"{module}.py").unlink()


def test_pairs(examples):
    pairs = preference_pairs(examples, seed=3, per_example=1)
    assert [p.source for p in pairs] == [e.source for e in examples]
    assert all(p.chosen == e.completion and p.held_out == e.held_out for p, e in zip(pairs, examples, strict=True))
    assert all(p.rejected != p.chosen and p.rejected for p in pairs)
    counts = Counter(p.kind for p in pairs)
    assert set(counts) == set(KINDS)
    assert all(abs(n / len(pairs) - 1 / len(KINDS)) < 0.02 for n in counts.values())

    part_of = {e.completion: e.held_out for e in examples}
    module_of = {e.completion: e.source.split(".")[0] for e in examples}
    for pair in pairs:
        if pair.kind in {"other", "sibling"}:
            assert part_of[pair.rejected] == pair.held_out
        if pair.kind == "sibling":
            assert module_of[pair.rejected] == pair.source.split(".")[0]
        if pair.kind == "shuffled":
            assert Counter(pair.rejected.split()) == Counter(pair.chosen.split())
        if pair.kind == "truncated":
            assert pair.chosen.startswith(pair.rejected)
            assert pair.rejected[-1] not in ".!?"
        if pair.kind == "repeated":
            assert len(pair.rejected.split()) > len(pair.chosen.split())


def test_pairs_are_seeded(examples):
    some = examples[:300]
    assert preference_pairs(some, seed=1, per_example=1) == preference_pairs(some, seed=1, per_example=1)
    assert preference_pairs(some, seed=1, per_example=1) != preference_pairs(some, seed=2, per_example=1)


def test_several_pairs_per_example_differ_in_kind(examples):
    pairs = preference_pairs(examples[:50], seed=0, per_example=2)
    assert len(pairs) == 100
    assert all(a.prompt == b.prompt for a, b in zip(pairs[::2], pairs[1::2], strict=True))
    assert sum(a.kind == b.kind for a, b in zip(pairs[::2], pairs[1::2], strict=True)) < 10  # "other" as a stand-in


@pytest.mark.parametrize(
    ("examples", "per_example", "message"),
    [
        ([Example("p\n", "One two three.", source="m.f")], 1, "single example"),
        ([Example("p\n", "One two three.", source="m.f")] * 2, 1, "same text"),
        ([], 0, "at least 1"),
    ],
)
def test_pairs_refuse(examples, per_example, message):
    with pytest.raises(InputError, match=message):
        preference_pairs(examples, seed=1, per_example=per_example)
