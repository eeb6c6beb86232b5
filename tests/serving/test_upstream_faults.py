"""`infalign serve` before servers that drip, answer oddly, and say what they should not."""

from __future__ import annotations

import json
import threading
import time

import pytest

from tests.rollouts.faulty_server import FaultyServer, answered, choices, drip, flood, good, message
from tests.serving.process import Served

SECRET = "sk-very-secret-0123456789abcdef"
INNER = "inner-gpu-7.cluster.local:8443"
TIMEOUT = 1.0
OK = b"HTTP/1.1 200 OK\r\n"


class Upstream(FaultyServer):
    """Answers by the plan that is set, as a model and as a reward server."""

    def __init__(self):
        self.model = self.reward = good
        super().__init__(
            lambda connection, request: (self.reward if "completions" in request.content else self.model)(
                connection, request
            )
        )


@pytest.fixture(scope="module")
def upstream():
    with Upstream() as server:
        yield server


@pytest.fixture(scope="module")
def server(upstream, tmp_path_factory):
    reward = f"http://127.0.0.1:{upstream.port}/r"
    arguments = ("--upstream", upstream.url, "--model-name", "toy", "--reward", reward, "--n", 2, "--timeout", TIMEOUT,
                 "--concurrency", 4, "--upstream-key-variable", "UPSTREAM_KEY")  # fmt: skip
    with Served("serve", *arguments, cwd=tmp_path_factory.mktemp("serve"), env={"UPSTREAM_KEY": SECRET}) as server:
        yield server


@pytest.fixture(autouse=True)
def healthy_again(upstream):
    yield
    upstream.model = upstream.reward = good


def ask(server):
    return server.post("/v1/completions", {"model": "toy", "prompt": "Say"})


def until_ok(server, seconds=20.0):
    end = time.monotonic() + seconds
    while ask(server)[0] != 200:
        assert time.monotonic() < end, "it did not recover"
    assert server.get("/health")[2]["status"] == "ok"


@pytest.mark.parametrize("place", ["model", "reward"])
@pytest.mark.parametrize("plan", [drip(OK + b"\r\n", b" "), drip(OK, b"A: b\r\n"), drip(b"HTTP/1.1 5", b"0")],
                         ids=["body", "headers", "status"])  # fmt: skip
def test_a_drip_holds_no_worker_beyond_the_time_limit(server, upstream, place, plan):
    until_ok(server)
    setattr(upstream, place, plan)
    answers, began = [], time.monotonic()
    asking = [threading.Thread(target=lambda: answers.append(ask(server)[0])) for _ in range(12)]
    for one in asking:
        one.start()
    for one in asking:
        one.join()
    assert answers == [503] * 12
    assert time.monotonic() - began < TIMEOUT + 3.0
    assert server.get("/health")[2]["status"] in ("upstream does not answer", "late")
    setattr(upstream, place, good)
    end = time.monotonic() + TIMEOUT + 5.0  # those that are under way end by themselves
    while server.get("/health")[2]["open"]:
        assert time.monotonic() < end
        time.sleep(0.05)
    until_ok(server)


@pytest.mark.parametrize("place", ["model", "reward"])
@pytest.mark.parametrize("status", [301, 302, 401, 403, 404, 407, 429, 500, 502, 503])
def test_what_the_upstream_says_in_refusing_us_is_not_passed_on(server, upstream, place, status):
    body = {"error": {"message": f"key {SECRET} of {INNER} (10.1.2.3) and {SECRET[6:22]} gossip"}}
    setattr(upstream, place, answered(status, body, Location=f"http://{INNER}/", WWW_Authenticate=SECRET))
    status, _, answer = ask(server)
    told = json.dumps(answer)
    assert (status, set(answer)) == (503, {"error"})
    assert not any(part in told for part in (SECRET, SECRET[6:22], INNER, "10.1.2.3", "gossip", str(upstream.port)))
    time.sleep(0.05)
    log = "".join(server.lines)
    assert not any(part in log for part in (SECRET, SECRET[6:22], INNER, "10.1.2.3"))


def test_why_a_request_is_refused_is_passed_on_without_secrets(server, upstream):
    body = {"error": {"message": f"the context is 2048 tokens long (Bearer {SECRET}, http://{INNER}/v1, 10.1.2.3)"}}
    upstream.model = answered(400, body)
    status, _, answer = ask(server)
    assert status == 400
    told = answer["error"]["message"]
    assert "the context is 2048 tokens long" in told
    assert not any(part in told for part in (SECRET, INNER, "10.1.2.3", str(upstream.port)))


ODD = {
    "deep": answered(200, b'{"choices": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "not JSON": answered(200, b"<html>"),
    "null": answered(200, b"null"),
    "a flood": flood(OK + b"\r\n", b" " * 65536),
    "no choice": choices(),
    "a number": choices(3, 3),
    "a message of text": choices({"message": "a", "finish_reason": "stop"}),
    "parts": choices({"message": {"content": [{"text": "a"}]}, "finish_reason": "stop"}),
    "half of a surrogate pair": answered(200, b'{"choices": [{"text": "\\ud83d", "finish_reason": "stop"}]}'),
    "aborted": choices({"text": "a", "finish_reason": "abort"}),
    "reset": lambda connection, request: None,
}


@pytest.mark.parametrize("name", ODD)
def test_odd_answers_of_the_model(server, upstream, name):
    upstream.model = ODD[name]
    status, headers, answer = ask(server)
    assert (status, answer["error"]["type"], headers["retry-after"]) == (503, "upstream_error", "5")


@pytest.mark.parametrize(
    "body",
    [
        *(b"null", b"[]", b'{"rewards": "ab"}', b'{"rewards": [NaN, 1]}', b'{"rewards": [1e999, 1]}'),
        *(b'{"rewards": [[], {}]}', b'{"rewards": ["\\ud83d", 1]}', b'{"rewards": [null, 1]}', b"[" * 100_000),
        b'{"rewards": [1, ' + b"9" * 4000 + b"]}",
    ],
    ids=range(10),
)
def test_odd_answers_of_the_reward(server, upstream, body):
    upstream.reward = answered(200, body)
    status, headers, answer = ask(server)
    assert (status, answer["error"]["type"], headers["retry-after"]) == (503, "reward_error", "5")


@pytest.mark.parametrize(
    "usage", [{"completion_tokens": 10**400}, {"completion_tokens": -5}, {"completion_tokens": "x"}, 7]
)
def test_odd_counts(server, upstream, usage):
    upstream.model = choices(*[{"text": "a", "finish_reason": "length"}] * 2, usage=usage)
    status, _, answer = ask(server)
    assert status == 200
    assert answer["infalign"]["num_tokens"] is None
    assert answer["choices"][0]["finish_reason"] == "length"


def test_no_redirect_is_followed(server, upstream):
    with FaultyServer(good) as other:
        upstream.model = upstream.reward = lambda connection, request: connection.sendall(
            message(307, b"", {"Location": f"http://127.0.0.1:{other.port}/v1/completions"})
        )
        assert ask(server)[0] == 503
        assert other.requests == []
