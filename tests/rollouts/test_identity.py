"""Two rewards that may score otherwise have different keys, and one reward has the same key in every process."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import decimal
import enum
import functools
import importlib
import os
import pathlib
import re
import subprocess
import sys
import threading
import types

import numpy as np
import pytest
import torch

from infalign.errors import InputError
from infalign.rewards.score import score_store
from infalign.rewards.source import FunctionReward
from infalign.rollouts.key import RolloutKey
from infalign.rollouts.prompts import Prompt
from infalign.rollouts.store import RolloutStore


def key(function):
    return FunctionReward(function).key


def signed(prompts, completions, sign=1, words=None):
    return [sign * len(completion) for completion in completions]


class Judge:
    def __init__(self, state):
        self.state = state

    def __call__(self, prompts, completions):
        return [self.state for _ in completions]

    def method(self, prompts, completions):
        return [self.state for _ in completions]

    @classmethod
    def of_class(cls, prompts, completions):
        return [cls.__name__ for _ in completions]

    def as_closure(self):
        return lambda prompts, completions: [self.state for _ in completions]


class Slots:
    __slots__ = ("state",)

    def __init__(self, state):
        self.state = state

    def __call__(self, prompts, completions):
        return [self.state for _ in completions]


@dataclasses.dataclass
class Data:
    state: object

    def __call__(self, prompts, completions):
        return [self.state for _ in completions]


class Upside(Judge):
    sign = 1


class Down(Judge):
    sign = -1


def captured(state):
    def judge(prompts, completions):
        return [state for _ in completions]

    return judge


def captured_in_two_steps(state):
    def inner(text):
        return state, text

    def judge(prompts, completions):
        return [inner(text) for text in completions]

    return judge


def by_default(state):
    def judge(prompts, completions, state=state):
        return [state for _ in completions]

    return judge


def by_keyword_default(state):
    def judge(prompts, completions, *, state=state):
        return [state for _ in completions]

    return judge


def attribute(state):
    def judge(prompts, completions):
        return [judge.state for _ in completions]

    judge.state = state
    return judge


def wrapped(state):
    @functools.wraps(signed)
    def judge(prompts, completions):
        return [state * reward for reward in signed(prompts, completions)]

    return judge


def of_new_class(state):
    return type("Judge", (Judge,), {"state": state, "__init__": lambda self: None})()


def bound_to_new_class(state):
    return types.MethodType(Judge.method, types.SimpleNamespace(state=state))


MAKERS = {
    "partial by name": lambda state: functools.partial(signed, sign=state),
    "partial by position": lambda state: functools.partial(lambda sign, prompts, completions: completions, state),
    "partial of a partial": lambda state: functools.partial(functools.partial(signed, words=1), sign=state),
    "partial of a method": lambda state: functools.partial(Judge(state).method),
    "partial of an instance": lambda state: functools.partial(Judge(state)),
    "instance": Judge,
    "instance with slots": Slots,
    "dataclass": Data,
    "instance in an instance": lambda state: Judge(Judge(state)),
    "instance in a list in a dict": lambda state: Judge({"inner": [Slots(state)]}),
    "method": lambda state: Judge(state).method,
    "method of another kind of object": bound_to_new_class,
    "class attribute": of_new_class,
    "closure": captured,
    "closure in a closure": captured_in_two_steps,
    "lambda that captured an object": lambda state: Judge(state).as_closure(),
    "default": by_default,
    "keyword default": by_keyword_default,
    "attribute of a function": attribute,
    "decorated": wrapped,
    "cached": lambda state: functools.lru_cache(captured(state)),
}


class Color(enum.Enum):
    RED = 1
    BLUE = 2


Pair = collections.namedtuple("Pair", "a b")
STATES = [
    (1, -1),
    (1, True),
    (1, 1.0),
    ("1", 1),
    (b"a", "a"),
    (0.1, 0.2),
    (None, 0),
    ([1, 2], [2, 1]),
    ([1], (1,)),
    ({"a": 1}, {"a": 2}),
    ({"a": 1}, {"b": 1}),
    ({1, 2}, {1, 3}),
    (Color.RED, Color.BLUE),
    (Pair(1, 2), Pair(1, 3)),
    (decimal.Decimal("1.1"), decimal.Decimal("1.2")),
    (datetime.date(2026, 1, 1), datetime.date(2026, 1, 2)),
    (pathlib.Path("a"), pathlib.Path("b")),
    (re.compile("a"), re.compile("b")),
    (re.compile("a"), re.compile("a", re.IGNORECASE)),
    (np.array([1.0, 2.0]), np.array([1.0, 3.0])),
    (np.array([1, 2]), np.array([[1, 2]])),
    (np.float32(1), np.float64(1)),
    (torch.tensor([1.0]), torch.tensor([2.0])),
    (torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([1.5], dtype=torch.bfloat16)),
    (len, sum),
    (str.upper, str.lower),
    (collections.deque([1]), collections.deque([2])),
    (collections.Counter("a"), collections.Counter("b")),
    (np.random.default_rng(1), np.random.default_rng(2)),
    (Upside(1), Down(1)),
    (Upside, Down),
    (lambda: 1, lambda: 2),
    (signed, captured),
    (datetime, re),
    (torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 2, bias=False)),
]


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_the_state_is_part_of_the_key(make):
    assert key(make(1)) == key(make(1))
    assert key(make(1)) != key(make(-1))
    assert str(FunctionReward(make(1)))


@pytest.mark.parametrize("pair", STATES, ids=lambda pair: f"{type(pair[0]).__name__}, {type(pair[1]).__name__}")
def test_states_that_differ_in_any_way(pair):
    one, other = pair
    assert key(Judge(one)) == key(Judge(one))
    assert key(Judge(one)) != key(Judge(other))
    assert key(captured(one)) != key(captured(other))
    assert key(functools.partial(signed, words=one)) != key(functools.partial(signed, words=other))


def test_functions_that_share_a_line_a_name_or_a_source():
    up, down = lambda prompts, completions: 1, lambda prompts, completions: -1
    assert key(up) != key(down)
    one, other = {}, {}
    exec("def judge(prompts, completions):\n    return [1 for _ in completions]", one)
    exec("def judge(prompts, completions):\n    return [2 for _ in completions]", other)
    assert key(one["judge"]) != key(other["judge"])
    code = "def judge(prompts, completions):\n    return [SIGN for _ in completions]"
    exec(code, up_to := {"SIGN": 1})
    exec(code, down_to := {"SIGN": -1})
    assert key(up_to["judge"]) != key(down_to["judge"])
    assert key(wrapped(1)) != key(signed), "a decorator is not what it decorates"
    assert key(Upside.of_class) != key(Down.of_class)
    assert key(Judge(1)) != key(Judge(1).method)
    assert key(Judge) != key(Slots)
    generous, strict = Judge(1), Judge(1)
    generous.extra = strict.other = 1
    assert key(generous) != key(strict)


def test_stored_rewards_of_another_state_are_not_taken(tmp_path):
    store = RolloutStore.open(tmp_path / "store", RolloutKey("m", "t", 4, 0))
    prompt = Prompt("prompt")
    store.append({"prompt_id": [prompt.id], "index": [0], "text": ["a"], "token_ids": [[1]], "logprob": [0.0],
                  "num_tokens": [1], "finish_reason": ["stop"]})  # fmt: skip
    for sign in (1, -1):
        source = FunctionReward(Judge(sign))
        assert score_store(store, source, [prompt]) == 1
        assert store.rewards_PK(source.key, [prompt.id], 1).tolist() == [[sign]]


class Opaque:
    """Has a state that cannot be written down."""

    def __init__(self, value):
        self.lines = (line for line in [value])

    def __call__(self, prompts, completions):
        return [1.0 for _ in completions]


@pytest.mark.parametrize(
    ("make", "place"),
    [
        (lambda: Opaque(1), "its attribute lines is a generator"),
        (lambda: Opaque(1).__call__, "its attribute lines is a generator"),
        (lambda: functools.partial(signed, words=sys.__stdout__), r"argument \['words'\] is a TextIOWrapper"),
        (lambda: captured(sys._getframe()), "what it captured as state is a frame"),
        (lambda: captured([iter(()), (x for x in ())]), r"what it captured as state\[1\] is a generator"),
    ],
    ids=["instance", "method", "partial", "closure", "within"],
)
def test_a_state_without_a_lasting_form_needs_a_key(make, place):
    function = make()
    with pytest.raises(InputError, match=place) as caught:
        FunctionReward(function)
    assert "Give key=" in str(caught.value)
    assert FunctionReward(function, key="judge-v1").key == "judge-v1"


def filled(prompts, completions):
    SEEN.append(len(SEEN))
    return [float(len(SEEN)) for _ in completions]


SEEN: list[int] = []


def test_what_calls_fill_is_no_state():
    before = key(filled)
    FunctionReward(filled).score(["p"], ["c"])
    assert SEEN
    assert key(filled) == before


def test_locks_are_no_state_and_circles_end():
    class Locked:
        def __init__(self, sign):
            self.sign, self.lock, self.me = sign, threading.Lock(), self

        def __call__(self, prompts, completions):
            with self.lock:
                return [self.sign for _ in completions]

    assert key(Locked(1)) == key(Locked(1)) != key(Locked(-1))


MODULE = """
import functools
import os
import re
import enum

import project_helpers
from project_helpers import imported

SIGN = {sign}
WORDS = {{"good": {word}}}
PATTERN = re.compile("{pattern}")
SEEN, CACHE, COUNT = [], {{}}, 0
LIMITS, THRESHOLD = {{"longest": int(os.environ.get("LONGEST", 1))}}, float(os.environ.get("THRESHOLD", 1))
TAGS = frozenset(["red", "green", "blue", "white"])


class Judge:
    def __init__(self, sign, tags):
        self.sign, self.tags, self.calls = sign, tags, 0

    def score(self, prompts, completions):
        return self(prompts, completions)

    def __call__(self, prompts, completions):
        self.calls += 1
        return [self.sign * helper(text) for text in completions]


JUDGE = Judge({sign}, {{"one", "two", "three", "four"}})


def helper(text):
    return {helped}


def plain(prompts, completions):
    return [1.0 for _ in completions]


def counted(prompts, completions):
    global COUNT
    COUNT += 1
    SEEN.append(completions)
    CACHE[len(CACHE)] = SEEN
    return [COUNT for _ in completions]


def by_constant(prompts, completions):
    return [SIGN for _ in completions]


def by_table(prompts, completions):
    return [WORDS.get(text, 0) for text in completions]


def by_pattern(prompts, completions):
    return [len(PATTERN.findall(text)) for text in completions]


def by_helper(prompts, completions):
    return [helper(text) for text in completions]


def by_judge(prompts, completions):
    return JUDGE(prompts, completions)


def by_environment(prompts, completions):
    return [LIMITS["longest"] + THRESHOLD for _ in completions]


def by_imported(prompts, completions):
    return [imported(text) for text in completions]


def by_module(prompts, completions):
    return [project_helpers.imported(text) for text in completions]


def tagged(prompts, completions, tags=TAGS):
    return [float(text in tags) for text in completions]


@functools.lru_cache
def cached(text):
    return len(text)


def by_cached(prompts, completions):
    return [cached(text) for text in completions]


short = functools.partial(tagged, tags=frozenset(["a", "b", "c"]))
small = lambda prompts, completions: [0.0 for _ in completions]
method = Judge({sign}, {{"x": {{"p", "q", "r"}}}}).__call__
"""
DEFINED = re.findall(r"^def (\w+)\(prompts|^(\w+) = (?:functools|lambda|Judge)", MODULE, re.MULTILINE)
NAMES = ["JUDGE.score", *(one or other for one, other in DEFINED)]
FIRST = {"sign": 1, "word": 2, "pattern": "a", "helped": "len(text)"}


def write(folder, **settings):
    folder.mkdir()
    settings = {**FIRST, **settings}
    (folder / "project_rewards.py").write_text(MODULE.format(**settings))
    (folder / "project_helpers.py").write_text(f"def imported(text):\n    return {settings['helped']}\n")
    return folder


PRINT = """
import sys
from infalign.rewards.source import FunctionReward
for name in sys.argv[1:]:
    before = FunctionReward(f"project_rewards:{name}")
    if name in ("counted", "by_judge", "by_cached", "JUDGE", "JUDGE.score"):
        before.score(["p"], ["c"])
    assert FunctionReward(f"project_rewards:{name}").key == before.key
    print(name, before.key)
"""


def keys_elsewhere(folder, hash_seed):
    env = {**os.environ, "PYTHONHASHSEED": str(hash_seed)}
    env["PYTHONPATH"] = f"{folder}{os.pathsep}{env.get('PYTHONPATH', '')}"
    command = [sys.executable, "-c", PRINT, *NAMES]
    out = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    return dict(line.split() for line in out.splitlines())


def test_the_same_in_every_process_and_wherever_it_lies(tmp_path, monkeypatch):
    first = keys_elsewhere(write(tmp_path / "one"), 1)
    assert set(first) == set(NAMES)
    assert len(NAMES) == 17
    assert keys_elsewhere(write(tmp_path / "two"), 2) == first
    assert len(set(first.values())) == len(NAMES)
    for name in ("LONGEST", "THRESHOLD"):
        monkeypatch.setenv(name, "2")
        other = keys_elsewhere(tmp_path / "two", 2)
        assert {one for one in NAMES if other[one] != first[one]} == {"by_environment"}
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("change", "others"),
    [
        ({"sign": -1}, {"by_constant", "by_judge", "JUDGE", "JUDGE.score", "method"}),
        ({"word": 3}, {"by_table"}),
        ({"pattern": "b"}, {"by_pattern"}),
        (
            {"helped": "-len(text)"},
            {"by_helper", "by_judge", "JUDGE", "JUDGE.score", "method", "by_imported", "by_module"},
        ),
    ],
    ids=["constant", "table", "pattern", "helper"],
)
def test_what_a_function_reads_of_its_module_counts_and_nothing_else(tmp_path, monkeypatch, change, others):
    def keys(folder):
        with monkeypatch.context() as patched:
            patched.syspath_prepend(str(folder))
            for name in ("project_rewards", "project_helpers"):
                patched.delitem(sys.modules, name, raising=False)
            importlib.invalidate_caches()
            found = {name: FunctionReward(f"project_rewards:{name}").key for name in NAMES}
            for name in ("project_rewards", "project_helpers"):
                sys.modules.pop(name)
            return found

    before = keys(write(tmp_path / "one"))
    after = keys(write(tmp_path / "two", **change))
    assert {name for name in NAMES if before[name] != after[name]} == others


@pytest.mark.parametrize("made", ["load()", "Judge()", "settings.load()"])
def test_state_that_a_module_makes_by_a_call_is_state(tmp_path, made):
    """A call without arguments may read a file: only containers count as empty."""
    code = f"""
import json, os, types
class Judge:
    def __init__(self): self.sign = float(os.environ["SIGN"])
def load(): return {{"sign": float(os.environ["SIGN"])}}
settings = types.SimpleNamespace(load=load)
JUDGE = {made}
def f(prompts, completions):
    sign = JUDGE["sign"] if isinstance(JUDGE, dict) else JUDGE.sign
    return [sign * len(c) for c in completions]
"""
    (tmp_path / "by_call.py").write_text(code)
    told = "from infalign.rewards.source import FunctionReward; print(FunctionReward('by_call:f').key)"
    keys = set()
    for sign in ("1", "-1"):
        environment = {**os.environ, "SIGN": sign, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
        found = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, env=environment)
        keys.add(found.stdout if found.returncode == 0 else f"refused {sign}")
        assert found.returncode == 0 or "key=" in found.stderr, found.stderr
    assert len(keys) == 2
