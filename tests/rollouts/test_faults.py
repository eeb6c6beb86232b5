"""What servers do wrong, one outcome each, over real sockets."""

from __future__ import annotations

import asyncio
import email.utils
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from infalign._io.http import Endpoint, EndpointError
from infalign._io.outside import outside_text
from infalign._io.threads import in_threads, time_limit
from infalign.errors import InputError, RewardError
from infalign.rewards.source import FunctionReward, HTTPReward
from infalign.rollouts.endpoint import ServedPolicy, sample_endpoint
from infalign.rollouts.key import RolloutKey
from infalign.rollouts.prompts import Prompt
from infalign.rollouts.store import RolloutStore
from infalign.run.testbed.toy import random_llama
from tests.rollouts.faulty_server import (
    PATIENCE,
    FaultyServer,
    answered,
    at_most,
    choices,
    drip,
    first,
    flood,
    good,
    message,
    quiet_after,
    reset,
    sent,
    silent,
)

SECRET = "sk-very-secret-0123456789abcdef"
KEY = RolloutKey("endpoint:toy", "none", max_new_tokens=5, seed=3, sampler="openai")
SICK, WELL = Prompt("sick"), Prompt("well")
OK = b"HTTP/1.1 200 OK\r\n"


@dataclass
class Case:
    """What the server does with requests about one of two prompts, and what becomes of that prompt's two rollouts.

    `rows` are (text, finish_reason) of those that are kept, a number where only their number is known; `error` is a
    part of the message, None where all is well; `requests` how often the server is asked, None where that is open.
    """

    plan: Any
    rows: Any = ()
    error: str | None = None
    requests: int | None = None
    never: tuple[str, ...] = ()  # not in the message


def chat(content, reason="stop", **more):
    return {"message": {"role": "assistant", "content": content, **more}, "finish_reason": reason}


def is_odd(choice, error, kept=(("b", "stop"),)):
    return Case(choices(choice, "b"), kept, error, 1)


NOT_JSON = "no usable answer in 2 tries (the answer is not JSON)"
LATE = "no usable answer in 2 tries (TimeoutError"
DEEP = b'{"choices": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
CASES = {
    # Statuses that pass.
    **{f"{status} once": Case(first(answered(status, b"later")), 2, None, 2)
       for status in (408, 409, 425, 429, 500, 502, 503, 504, 529)},
    "429 for ever": Case(answered(429, b"slow down"), (), "in 2 tries (status 429) (slow down)", 2),
    "500 for ever": Case(answered(500, b"out of memory"), (), "in 2 tries (status 500) (out of memory)", 2),
    "500 with an endless body": Case(flood(message(500, b"x", length=False), b"y" * 65536), (), "(status 500)", 2),
    "503 without a body": Case(answered(503), (), "in 2 tries (status 503)", 2),
    "Retry-After that says nothing": Case(first(answered(429, Retry_After="soon, perhaps")), 2, None, 2),
    "Retry-After in the past": Case(first(answered(429, Retry_After="Wed, 21 Oct 2015 07:28:00 GMT")), 2, None, 2),
    "Retry-After below zero": Case(first(answered(429, Retry_After="-3")), 2, None, 2),
    "Retry-After that is no number": Case(first(answered(429, Retry_After="nan")), 2, None, 2),
    "Retry-After out of all reason": Case(first(answered(429, Retry_After="Wed, 21 Oct 99999999 07:28:00 GMT")), 2),
    # Statuses that do not.
    **{f"{status}": Case(answered(status, b"no"), (), f"the server refused the request (status {status}", 1)
       for status in (404, 405, 410, 413, 415, 431, 451, 501, 505)},
    "401": Case(answered(401, f"{SECRET} is wrong".encode()), (), "(status 401)", 1, never=("wrong", "secret")),
    "403": Case(answered(403, b"you at 10.1.2.3 may not"), (), "(status 403)", 1, never=("may not", "10.1.2.3")),
    "407": Case(answered(407, b"proxy"), (), "(status 407)", 1),
    **{f"redirect {status}": Case(answered(status, Location="http://127.0.0.1:9/v1/completions"), (),
                                  f"sends this request on to another address (status {status})", 1)
       for status in (300, 301, 302, 303, 304, 307, 308)},
    "400 for any n": Case(answered(400, b"the prompt is too long"), (), "status 400: the prompt is too long"),
    "422 that echoes the key": Case(answered(422, f"Bearer {SECRET} {SECRET[5:20]}".encode()), (), "[secret]",
                                    never=("very-secret", "0123456")),
    # Bodies that are no answer.
    "empty body": Case(answered(200), (), NOT_JSON, 2),
    "204": Case(answered(204), (), NOT_JSON, 2),
    "half of the JSON": Case(answered(200, b'{"choices": [{"te'), (), NOT_JSON, 2),
    "a web page": Case(answered(200, b"<html>busy</html>"), (), NOT_JSON, 2),
    "not JSON once": Case(first(answered(200, b"oops")), 2, None, 2),
    "not UTF-8": Case(answered(200, b"\xff\xfe{}"), (), NOT_JSON, 2),
    "UTF-16": Case(answered(200, '{"choices": []}'.encode("utf-16")), (), NOT_JSON, 2),
    "a byte order mark": Case(answered(200, b"\xef\xbb\xbf" + json.dumps({"choices": [
        {"text": "a", "finish_reason": "stop"}, {"text": "b", "finish_reason": "stop"}]}).encode()),
        (("a", "stop"), ("b", "stop")), None, 1),
    "compressed": Case(answered(200, b"\x1f\x8b\x08\x00", Content_Encoding="gzip"), (), NOT_JSON, 2),
    "deep JSON": Case(answered(200, DEEP), (), NOT_JSON, 2),
    "a number of 5000 digits": Case(answered(200, b'{"choices": ' + b"9" * 5000 + b"}"), (), NOT_JSON, 2),
    "a number of 4000 digits": Case(answered(200, b'{"choices": ' + b"9" * 4000 + b"}"), (), "has no choices", 1),
    "an event stream": Case(answered(200, b'data: {"choices": []}\n\n'), (), NOT_JSON, 2),
    **{f"the body {body.decode()}": Case(answered(200, body), (), "the answer has no choices", 1)
       for body in (b"null", b"3", b'"text"', b"[1]", b"NaN", b"{}", b'{"error": "busy"}', b'{"choices": null}',
                    b'{"choices": {"0": 1}}', b'{"choices": "ab"}')},
    "an error that echoes the key": Case(answered(200, {"error": f"no {SECRET}"}), (), "[secret]", never=("very-s",)),
    # Choices.
    "no choice": Case(choices(), (), "no finished choice", 2),
    "no choice once": Case(first(choices()), 2, None, 2),
    "fewer choices than asked for": Case(choices("a"), (("a", "stop"), ("a", "stop")), None, 2),
    "more choices than asked for": Case(choices("a", "b", "c"), (("a", "stop"), ("b", "stop")), None, 1),
    "cut": Case(choices({"text": "a", "finish_reason": "length"}, "b"), (("a", "length"), ("b", "stop")), None, 1),
    "cut inside its reasoning": Case(choices(chat(None, "length"), "b"), (("", "length"), ("b", "stop")), None, 1),
    "ended without an answer": Case(choices(chat(None), "b"), (("", "stop"), ("b", "stop")), None, 1),
    "without the field of its text": Case(choices({"message": {}, "finish_reason": "length"}, "b"),
                                          (("", "length"), ("b", "stop")), None, 1),
    "empty text": Case(choices("", "b"), (("", "stop"), ("b", "stop")), None, 1),
    "filtered": Case(choices(chat(None, "content_filter"), "b"), (("", "length"), ("b", "stop")), None, 1),
    "filtered half way": Case(choices(chat("ha", "content_filter"), "b"), (("ha", "length"), ("b", "stop")), None, 1),
    "NUL and control characters": Case(choices("a\0\x1b[2J", "b"), (("a\0\x1b[2J", "stop"), ("b", "stop")), None, 1),
    "half of a surrogate pair": Case(answered(200, b'{"choices": [{"text": "\\ud83d", "finish_reason": "stop"}, '
                                              b'{"text": "\\ud83d\\ude00", "finish_reason": "stop"}]}'),
                                     (("\N{GRINNING FACE}", "stop"),), "half of a surrogate pair", 1),
    **{f"a choice that is {choice!r}": is_odd(choice, "is not an object") for choice in (None, 3, [], [["a"]])},
    "a text that is a number": is_odd({"text": 3, "finish_reason": "stop"}, "has a text that is none"),
    "a text in parts": is_odd(chat([{"type": "text", "text": "a"}]), "has a text that is none"),
    "a message that is text": is_odd({"message": "a", "finish_reason": "stop"}, "neither text nor a message"),
    "a message that is null": is_odd({"message": None, "finish_reason": "stop"}, "neither text nor a message"),
    "a tool call": is_odd(chat(None, "tool_calls", tool_calls=[{"id": "1"}]), "is a tool call"),
    "a function call": is_odd(chat(None, "function_call", function_call={"name": "f"}), "is a tool call"),
    "a tool call that ends": is_odd(chat("", "stop", tool_calls=[{"id": "1"}]), "is a tool call"),
    **{f"finish_reason {reason!r}": is_odd({"text": "a", "finish_reason": reason}, "did not end by itself")
       for reason in (None, "abort", "error", "", 3, ["stop"], {"type": "stop"})},
    "no finish_reason": is_odd({"text": "a"}, "did not end by itself"),
    **{f"usage {usage!r}": Case(choices("a", "b", usage=usage), (("a", "stop"), ("b", "stop")), None, 1)
       for usage in (None, 3, [], {"completion_tokens": "9"}, {"completion_tokens": -1},
                     {"completion_tokens": 10**400}, {"completion_tokens": [1]})},
    # The wire.
    "closed at once": Case(sent(), (), "in 2 tries (RemoteDisconnected", 2),
    "closed at once, once": Case(first(sent()), 2, None, 2),
    "reset": Case(reset, (), "in 2 tries (ConnectionResetError", 2),
    "not HTTP": Case(sent(b"SSH-2.0-OpenSSH\r\n"), (), "in 2 tries (BadStatusLine", 2),
    "a status line with the key": Case(sent(f"{SECRET}\r\n".encode()), (), "in 2 tries (BadStatusLine", 2,
                                       never=("very-secret",)),
    "closed in the status line": Case(sent(b"HTTP/1.1 2"), (), "in 2 tries", 2),
    "closed in the headers": Case(sent(OK + b"Content-Len"), (), NOT_JSON, 2),
    "closed in the body": Case(sent(OK + b"Content-Length: 100\r\n\r\n{}"), (), "in 2 tries (IncompleteRead", 2),
    "a length that is too short": Case(sent(OK + b"Content-Length: 5\r\n\r\n" + b'{"choices": []}'), (), NOT_JSON, 2),
    "a length below zero": Case(sent(OK + b"Content-Length: -5\r\n\r\n{}"), (), "the answer has no choices", 1),
    "200 headers": Case(sent(OK + b"".join(b"A%d: b\r\n" % i for i in range(200)) + b"\r\n{}"), (),
                        "in 2 tries (HTTPException: got more than 100 headers", 2),
    "a header of 1 MB": Case(sent(OK + b"A: " + b"b" * (1 << 20)), (), "in 2 tries (LineTooLong", 2),
    "chunks that are none": Case(sent(OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"), (), "in 2 tries", 2),
    "cut in a chunk": Case(sent(OK + b"Transfer-Encoding: chunked\r\n\r\nff\r\n{}"), (), "in 2 tries", 2),
    "in chunks": Case(sent(OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"), (), "has no choices", 1),
    "silent": Case(silent, (), LATE, 2),
    "silent once": Case(first(silent), 2, None, 2),
    "silent after the headers": Case(quiet_after(OK + b"Content-Length: 100\r\n\r\n"), (), LATE, 2),
    "silent within the body": Case(quiet_after(OK + b"Content-Length: 100\r\n\r\n{"), (), LATE, 2),
    "a drip in the status line": Case(drip(b"HTTP/1.1 200 ", b"O"), (), LATE, 2),
    "a drip of headers": Case(drip(OK, b"A: b\r\n"), (), LATE, 2),
    "a drip within a header": Case(drip(OK + b"A: ", b"b"), (), LATE, 2),
    "a drip in the body": Case(drip(OK + b"Content-Length: 10000\r\n\r\n", b" "), (), LATE, 2),
    "a drip in a body without a length": Case(drip(OK + b"\r\n", b" "), (), LATE, 2),
    "a drip of chunks": Case(drip(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"), (), LATE, 2),
    "a drip in a refusal": Case(drip(b"HTTP/1.1 400 No\r\n\r\n", b"x"), (), LATE, 2),
    "a drip of trailers": Case(drip(OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n", b"A: b\r\n"), (),
                               LATE, 2),
    "continue for ever": Case(drip(b"", b"HTTP/1.1 100 Continue\r\n\r\n"), (), LATE, 2),
    "more than 1 TB announced": Case(quiet_after(OK + b"Content-Length: 1000000000000\r\n\r\n"), (), "larger than", 1),
    "a flood of blanks": Case(flood(OK + b"\r\n", b" " * 65536), (), "larger than", 1),
    "a flood of blanks with a length": Case(flood(OK + b"Content-Length: 400000000\r\n\r\n", b" " * 65536), (),
                                            "larger than", 1),
    "a flood of chunks": Case(flood(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"10000\r\n" + b" " * 65536 + b"\r\n"),
                              (), "larger than", 1),
}  # fmt: skip


def endpoint(server, **changes):
    return Endpoint(server.url, **{"timeout": PATIENCE, "retries": 1, "first_wait": 0.01, **changes})


def test_the_table_is_large_enough():
    assert len(CASES) + len(REWARDS) >= 140


@pytest.mark.parametrize("name", CASES)
def test_a_server_that_fails_one_of_two_prompts(tmp_path, monkeypatch, name):
    case = CASES[name]
    monkeypatch.setenv("FAULTS_KEY", SECRET)
    sick: list[Any] = []

    def plan(connection, request):
        if request.asked != SICK.prompt:
            return good(connection, request)
        request.number = len(sick)
        sick.append(request)
        return case.plan(connection, request)

    store = RolloutStore.open(tmp_path / "store", KEY)
    failure, began = "", time.monotonic()
    with FaultyServer(plan) as server:
        try:
            sample_endpoint(endpoint(server, api_key_variable="FAULTS_KEY"), "toy", [SICK, WELL], 2, store=store,
                            concurrency=2, request_fields={})  # fmt: skip
        except EndpointError as error:
            failure = str(error)
    assert time.monotonic() - began < 2 * PATIENCE + 2.0  # two tries, and room for a busy machine
    table = store.table(["prompt_id", "text", "finish_reason"]).to_pylist()
    assert sum(row["prompt_id"] == WELL.id for row in table) == 2, "the other prompt is no worse off"
    rows = sorted((row["text"], row["finish_reason"]) for row in table if row["prompt_id"] == SICK.id)
    if isinstance(case.rows, int):
        assert len(rows) == case.rows
    else:
        assert rows == sorted(case.rows)
    if case.error is None:
        assert failure == ""
    else:
        assert "1 of 2 prompts could not be finished" in failure
        assert case.error in failure
    assert SECRET not in failure
    assert not any(part in failure for part in case.never)
    assert len(failure) < 2000
    if case.requests is not None:
        assert len(sick) == case.requests
    if hasattr(case.plan, "sent"):
        assert case.plan.sent < 64 << 20, "it was cut off long before its end"


REWARDS = {
    "as it should be": (answered(200, {"rewards": [1, 2.5]}), [1.0, 2.5], None),
    "a list alone": (answered(200, [1, 2]), [1.0, 2.0], None),
    "null": (answered(200, {"rewards": [None, 2]}), [None, 2.0], "it returned no reward"),
    "busy once": (first(answered(503)), [1.0, 2.0], None),
    "500": (
        answered(500, f"cannot, {SECRET} at http://10.0.0.1/".encode()),
        [None, None],
        "cannot, [secret] at [address]",
    ),
    "401": (answered(401, b"who are you"), [None, None], "(status 401)"),
    "400": (answered(400, b"too long"), [None, None], "status 400: too long"),
    "redirect": (answered(302, Location="http://127.0.0.1:9/"), [None, None], "sends this request on"),
    "silent": (silent, [None, None], "TimeoutError"),
    "a drip": (drip(OK + b"\r\n", b" "), [None, None], "TimeoutError"),
    "a flood": (flood(OK + b"\r\n", b" " * 65536), [None, None], "larger than"),
    "not JSON": (answered(200, b"oops"), [None, None], "not JSON"),
    "deep JSON": (answered(200, DEEP), [None, None], "not JSON"),
    "too few": (answered(200, {"rewards": [1]}), RewardError, "1 reward for 2 completions"),
    "too many": (answered(200, {"rewards": [1, 2, 3]}), RewardError, "3 rewards for 2 completions"),
    "no rewards": (answered(200, {"scores": [1, 2]}), RewardError, "not a list"),
    "rewards that are text": (answered(200, {"rewards": "12"}), RewardError, "not a list"),
    "rewards that are an object": (answered(200, {"rewards": {"0": 1, "1": 2}}), RewardError, "not a list"),
    "a number alone": (answered(200, b"3"), RewardError, "not a list"),
    "NaN": (answered(200, b'{"rewards": [1, NaN]}'), RewardError, "row 1: the reward is nan"),
    "infinity": (answered(200, b'{"rewards": [-Infinity, 1]}'), RewardError, "row 0: the reward is -inf"),
    "1e999": (answered(200, b'{"rewards": [1, 1e999]}'), RewardError, "row 1: the reward is inf"),
    "4000 digits": (answered(200, b'{"rewards": [1, ' + b"9" * 4000 + b"]}"), RewardError, "row 1: the reward is inf"),
    "text": (answered(200, {"rewards": [1, "high"]}), RewardError, "row 1: the reward is"),
    "the key": (answered(200, {"rewards": [SECRET, 1]}), RewardError, "row 0: the reward is"),
    "lists": (answered(200, {"rewards": [[1], [SECRET]]}), RewardError, "row 0: the reward is"),
    "half of a surrogate pair": (answered(200, b'{"rewards": ["\\ud83d", 1]}'), RewardError, "row 0: the reward is"),
}


@pytest.mark.parametrize("name", REWARDS)
def test_a_reward_server_that_fails(monkeypatch, name):
    plan, outcome, told = REWARDS[name]
    monkeypatch.setenv("FAULTS_KEY", SECRET)
    with FaultyServer(plan) as server:
        source = HTTPReward(endpoint(server, api_key_variable="FAULTS_KEY"), name="lengths")
        if outcome is RewardError:
            with pytest.raises(RewardError) as caught:
                source.score(["p", "q"], ["a", "bb"])
            message = str(caught.value)
        else:
            scores = source.score_rows(["p", "q"], ["a", "bb"])
            assert [None if np.isnan(one) else one for one in scores.rewards] == outcome
            message = " ".join(error for error in scores.errors if error)
    assert (told or "") in message
    assert "very-secret" not in message
    assert str(server.port) not in message, "what is stored does not say where the server is"
    message.encode()
    assert len(message) < 2000


# --- waiting, and leaving ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 422])
def test_the_n_of_a_server_is_found_once(tmp_path, status):
    prompts = [Prompt(f"prompt {i}") for i in range(5)]
    with FaultyServer(at_most(3, status)) as server:
        store = RolloutStore.open(tmp_path / "store", KEY)
        drawn = sample_endpoint(endpoint(server), "toy", prompts, 16, store=store, concurrency=1, request_fields={})
    assert drawn == 80
    asked = [request.content["n"] for request in server.requests]
    assert asked[:4] == [16, 8, 4, 2], "halved until it is accepted"
    assert set(asked[4:]) == {2}, "and then known"
    assert len(set(store.column_PK("text", [one.id for one in prompts], 16).ravel())) == 80
    seeds = [request.content["seed"] for request in server.requests[3:]]
    assert len(set(seeds)) == len(seeds)


def test_a_prompt_that_is_refused_for_itself_is_not_halved_again(tmp_path):
    def plan(connection, request):
        (answered(400, b"too long") if request.asked == SICK.prompt else good)(connection, request)

    with FaultyServer(plan) as server:
        policy = ServedPolicy(endpoint(server), "toy", concurrency=1, request_fields={})
        policy.draw([WELL], 8, store=RolloutStore.open(tmp_path / "store", KEY))
        with pytest.raises(EndpointError, match="too long"):
            policy.draw([WELL, SICK], 8, store=RolloutStore.open(tmp_path / "store", KEY))
    assert [request.asked for request in server.requests] == ["well", "sick"]


def test_retry_after_may_be_a_date():
    date = email.utils.formatdate(time.time() + 2.0, usegmt=True)  # whole seconds: at least one from now
    with FaultyServer(first(answered(503, Retry_After=date), answered(200, {"rewards": [1]}))) as server:
        assert endpoint(server).post("", {"completions": ["a"]}) == {"rewards": [1]}
    one, two = server.requests
    assert 0.9 < two.at - one.at < 4.0


def test_a_server_that_cannot_be_reached():
    with FaultyServer(good) as server:
        pass
    with pytest.raises(EndpointError, match=r"no usable answer in 2 tries.*ConnectionRefusedError"):
        endpoint(server).post("", {})
    with pytest.raises(EndpointError, match="no usable answer in 2 tries"), FaultyServer(silent) as server:
        Endpoint(server.url.replace("http:", "https:"), timeout=PATIENCE, retries=1, first_wait=0.01).post("", {})


def test_a_server_that_does_not_read():
    """What is sent, too, must be through in time."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as deaf:
        began = time.monotonic()
        server = Endpoint(f"http://127.0.0.1:{deaf.getsockname()[1]}/v1", timeout=PATIENCE, retries=0)
        with pytest.raises(EndpointError, match="TimeoutError"):
            server.post("", {"prompt": "x" * (32 << 20)})
        assert time.monotonic() - began < PATIENCE + 2.0


def test_a_time_limit_is_that_of_all_tries_together():
    with FaultyServer(answered(503, Retry_After="30")) as server:
        began = time.monotonic()
        with pytest.raises(EndpointError, match="no usable answer in time"), time_limit(1.0):
            endpoint(server, retries=9).post("", {})
        assert time.monotonic() - began < 1.0, "it does not wait for what comes too late"
    with FaultyServer(silent) as server:
        began = time.monotonic()
        source = HTTPReward(endpoint(server, timeout=60, retries=9), name="n", batch_size=1)
        with time_limit(0.5):
            assert np.isnan(source.score(["p"] * 3, ["c"] * 3)).all(), "also in the threads that it starts"
        assert time.monotonic() - began < 2.5


def test_threads_stop_with_who_waits_for_them():
    seen, gate = [], threading.Event()

    def work(item):
        seen.append(item)
        if item == 1:
            raise ValueError("one")
        gate.wait(5)
        return item

    with pytest.raises(ValueError, match="one"):
        list(in_threads(work, range(100), 4))
    gate.set()
    time.sleep(0.1)
    assert len(seen) <= 8, "nothing new is taken up"
    with pytest.raises(ZeroDivisionError):
        list(in_threads(work, (1 / 0 for _ in range(1)), 2))
    assert sorted(one[1] for one in in_threads(lambda x: x * x, range(9), 3)) == [x * x for x in range(9)]


def test_an_async_reward_inside_a_running_event_loop():
    async def later(prompts, completions):
        await asyncio.sleep(0)
        return [float(len(text)) for text in completions]

    async def never(prompts, completions):
        raise SystemExit

    async def notebook():
        with pytest.raises(RewardError, match="ended the program"):
            FunctionReward(never).score(["p"], ["c"])
        return FunctionReward(later).score(["p", "q"], ["a", "bb"]).tolist()

    assert asyncio.run(notebook()) == FunctionReward(later).score(["p", "q"], ["a", "bb"]).tolist() == [1.0, 2.0]


DECODE = ("decode", "--model-name", "toy", "--procedure", "standard", "--max-new-tokens", "4")


def heed_interrupts():
    """Whoever runs the tests in the background ignores SIGINT, and so would the processes started from there."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def started(tmp_path, *arguments, code="from infalign.cli.main import main; main()", env=None):
    """A process of ours as a user starts it from a terminal."""
    kept = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, cwd=tmp_path, env={**kept, **(env or {})},
                            preexec_fn=heed_interrupts)  # fmt: skip


@pytest.mark.parametrize("plan", [silent, drip(OK + b"\r\n", b" "), answered(503, Retry_After="60")],
                         ids=["silent", "drip", "told to wait"])  # fmt: skip
@pytest.mark.parametrize("prompts", [1, 20])
def test_ctrl_c_while_a_server_does_not_answer(tmp_path, plan, prompts):
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"p {i}"}) + "\n" for i in range(prompts)))
    with FaultyServer(plan) as server:
        process = started(
            tmp_path, *DECODE, "--endpoint", server.url, "--prompts", "prompts.jsonl", "--out", "out.jsonl"
        )
        try:
            end = time.monotonic() + 60
            while len(server.requests) < min(prompts, 16):
                assert time.monotonic() < end
                assert process.poll() is None, process.stdout.read()
                time.sleep(0.02)
            time.sleep(0.2)
            began = time.monotonic()
            process.send_signal(signal.SIGINT)
            process.wait(30)
            took = time.monotonic() - began
        finally:
            process.kill()
        told = process.stdout.read()
        process.stdout.close()
    assert took < 2.0
    assert process.returncode == 130
    assert "Stopped; the same command goes on from here." in told
    assert "Traceback" not in told


def test_ctrl_c_with_a_model_in_memory_while_the_reward_server_is_silent(tmp_path):
    """Taking down torch and its like takes seconds, which nobody waits for."""
    random_llama(tmp_path / "policy", spread=1.0, max_length=96, seed=4)
    with FaultyServer(silent) as server:
        arguments = (
            "decode",
            "--model",
            "policy",
            "p",
            "--procedure",
            "best-of-2",
            "--max-new-tokens",
            "4",
        )
        process = started(tmp_path, *arguments, "--reward", server.url)
        try:
            end = time.monotonic() + 100
            while not server.requests:
                assert time.monotonic() < end
                assert process.poll() is None, process.stdout.read()
                time.sleep(0.02)
            began = time.monotonic()
            process.send_signal(signal.SIGINT)
            process.wait(30)
            took = time.monotonic() - began
        finally:
            process.kill()
        told = process.stdout.read()
        process.stdout.close()
    assert (process.returncode, took < 2.0) == (130, True)
    assert "Stopped." in told


# --- where requests go ------------------------------------------------------------------------------------------------

WATCHED = """
import sys
found = set()
def watch(event, arguments):
    if event == "socket.connect":
        found.add(repr(arguments[1]))
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        found.add(repr(arguments[0]))
    elif event == "socket.sendto":
        found.add(repr(arguments[1]))
sys.addaudithook(watch)
from infalign.cli.main import main
try:
    main()
finally:
    print("WENT TO", sorted(found))
"""


def test_no_request_leaves_for_a_host_that_the_user_did_not_name(tmp_path):
    """The server names another in every way there is; so do the texts that it gives."""
    away = {
        "Location": "", "Refresh": "0; url=", "Content-Location": "", "Link": "", "Alt-Svc": "", "Origin": "",
    }  # fmt: skip

    def plan(connection, request):
        elsewhere = {name: f"{value}http://127.0.0.1:{other.port}/" for name, value in away.items()}
        if "completions" in request.content:
            status = 302 if request.content["completions"][0].endswith("0") else 200
            return connection.sendall(
                message(status, {"rewards": [1.0] * len(request.content["completions"])}, elsewhere)
            )
        moved = {"p 0": 301, "p 1": 302, "p 2": 303, "p 3": 307, "p 4": 308}.get(request.asked, 200)
        text = f"![image](http://127.0.0.1:{other.port}/{request.asked})"
        body = {"choices": [{"text": text, "finish_reason": "stop"}] * request.content["n"]}
        return connection.sendall(message(moved, body, elsewhere))

    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"p {i}"}) + "\n" for i in range(8)))
    with FaultyServer(good) as other, FaultyServer(plan) as named:
        process = started(
            *(tmp_path, *DECODE[:3], "--procedure", "best-of-2", "--max-new-tokens", "4", "--endpoint", named.url),
            *("--prompts", "prompts.jsonl", "--out", "out.jsonl", "--reward", f"http://127.0.0.1:{named.port}/score"),
            *("--api-key-variable", "FAULTS_KEY"),
            code=WATCHED,
            env={"FAULTS_KEY": SECRET},
        )
        told, _ = process.communicate(timeout=100)
        assert other.requests == []
        assert any(request.path == "/score" for request in named.requests)
        assert sum(request.path == "/v1/completions" for request in named.requests) >= 8
    went = re.findall(r"WENT TO (.*)", told)
    assert went, told
    assert set(re.findall(r"'([^']*)'", went[0])) <= {"127.0.0.1"}, went
    assert set(re.findall(r"\d{2,5}(?=\))", went[0])) == {str(named.port)}, went
    assert SECRET not in told
    assert "redirect" in told.lower()


# --- keys -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["two\nlines", "end\r\n", "a b", "tab\tbed", "ключ", "\x00", "nbsp\xa0"])
def test_a_key_that_cannot_be_sent_is_said_at_once(monkeypatch, key):
    if "\x00" in key:
        monkeypatch.setattr(os, "environ", {**os.environ, "FAULTS_KEY": key})
    else:
        monkeypatch.setenv("FAULTS_KEY", key)
    with pytest.raises(InputError, match="FAULTS_KEY has a ") as caught:
        Endpoint("http://127.0.0.1:9/v1", api_key_variable="FAULTS_KEY")
    assert key.strip() not in str(caught.value)
    monkeypatch.delenv("FAULTS_KEY", raising=False)
    later = Endpoint("http://127.0.0.1:9/v1", api_key_variable="FAULTS_KEY")
    with pytest.raises(EndpointError, match="FAULTS_KEY is not set"):
        later.post("", {})


@pytest.mark.parametrize(
    "url",
    [
        f"http://host/v1?api_key={SECRET}",
        f"http://host/v1?{SECRET}",
        f"http://host/v1#{SECRET}",
        f"http://{SECRET}@host/v1",
        f"http://me:{SECRET}@host/v1",
        f"http://:{SECRET}@host/v1",
        f"http://host:port/v1?key={SECRET}",
        f"http://host:99999/?key={SECRET}",
        f"http:///v1?key={SECRET}",
        f"ftp://me:{SECRET}@host",
        f"http://host/v1\n?{SECRET}",
        f"http://ho st/{SECRET}",
        f"http://höst/v1?{SECRET}",
        f"http://[::1/v1?{SECRET}",
        SECRET,
        "",
    ],
)
def test_addresses_that_are_none_or_hold_a_key(url):
    with pytest.raises(InputError) as caught:
        Endpoint(url)
    assert SECRET not in str(caught.value)
    assert "very-secret" not in str(caught.value)


@pytest.mark.parametrize("name", [SECRET, "hf_abcdefghijklmnop1234", "two words", "", "a=b", "1st", "a\nb"])
def test_a_key_in_the_place_of_its_variable(name):
    with pytest.raises(InputError, match="perhaps a key") as caught:
        Endpoint("http://127.0.0.1:9/v1", api_key_variable=name)
    assert len(name) < 5 or name not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"bad key {SECRET}!", "bad key [secret]!"),
        (f"…{SECRET[6:20]}…", "…[secret]…"),
        (SECRET.upper(), "[secret]"),
        ("c2stdmVyeS1zZWNyZXQtMDEyMzQ1Njc4OWFiY2RlZg==", "[secret]=="),
        (SECRET.encode().hex(), "[secret]"),
        ("Incorrect API key provided: sk-abcd*****wxyz.", "Incorrect API key provided: [secret]"),
        ('{"Authorization": "Bearer abc.def"}', '{"Authorization": "Bearer [secret]"}'),
        ('{"token": "abc", "n": 3}', '{"token": "[secret]", "n": 3}'),
        ("connect to http://inner:80/x failed", "connect to [address] failed"),
        ("10.0.0.5:8000 and gpu-7:8000 and db.internal", "[address] and [address] and [address]"),
        ("[fe80::1]:80 refused", "[address] refused"),
        ("2048 tokens at most, max_tokens: 4096", "2048 tokens at most, max_tokens: 4096"),
        (b"\xff\xfe", "\ufffd\ufffd"),
        ("x" * 1000, "x" * 299 + "…"),
    ],
)
def test_what_is_cut_from_what_a_server_says(text, shown):
    assert outside_text(text, [SECRET]) == shown
