"""A server that others are rude to: half-open connections, drips, foreign Host headers, odd bodies."""

import contextlib
import http.client
import json
import resource
import socket
import threading
import time

import pytest
import uvicorn
from fastapi import FastAPI, Request

from infalign.select.serving.connections import (
    Connections,
    host_is_ours,
    is_loopback,
    most_connections,
    patient_protocol,
)
from infalign.select.serving.web import BodyLimit, check_host, make_app
from tests.runs import infalign
from tests.serving.process import Served

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")


@contextlib.contextmanager
def serving(app, limit=8, seconds=0.4):
    """The app behind our protocol, in a thread; gives its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        protocol = patient_protocol(Connections(limit, seconds))
        config = uvicorn.Config(app, http=protocol, ws="none", lifespan="off", log_level="error")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(10)


def small_app(seconds=0.5, max_body=1000) -> FastAPI:
    app = make_app("test", max_body=max_body)
    app.user_middleware = [one for one in app.user_middleware if one.cls is not BodyLimit]
    app.add_middleware(BodyLimit, max_body=max_body, seconds=seconds)

    @app.post("/echo")
    async def echo(request: Request) -> int:
        return len(await request.body())

    @app.get("/health")
    async def health() -> str:
        return "ok"

    return app


def ask(port, method="GET", path="/health", body=None, headers=None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def opened(port, text=b""):
    one = socket.create_connection(("127.0.0.1", port), timeout=10)
    one.sendall(text)
    return one


def until_closed(one, seconds=5.0):
    """Seconds until the server closes, and what it said."""
    began, said = time.monotonic(), b""
    one.settimeout(seconds)
    with contextlib.suppress(ConnectionResetError):
        while part := one.recv(4096):
            said += part
    return time.monotonic() - began, said


@pytest.mark.parametrize("text", [b"", b"GET /hea", b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: "])
def test_headers_have_a_deadline(text):
    with serving(small_app()) as port, opened(port, text) as one:
        assert 0.2 < until_closed(one)[0] < 3


def test_dripping_headers_do_not_move_the_deadline():
    with serving(small_app()) as port, opened(port, b"GET /health HTTP/1.1\r\n") as one:
        began = time.monotonic()
        with contextlib.suppress(OSError):
            while time.monotonic() < began + 5:
                one.sendall(b"X-A: b\r\n")
                time.sleep(0.05)
        assert time.monotonic() - began < 3


def test_a_connection_that_has_been_answered_may_wait_and_ask_again():
    with serving(small_app()) as port:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        for _ in range(2):
            connection.request("GET", "/health")
            assert connection.getresponse().read() == b'"ok"'
            time.sleep(0.8)
        connection.close()


def test_a_body_has_a_deadline():
    with serving(small_app(), seconds=5) as port:
        with opened(port, b"POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 500\r\n\r\n") as one:
            one.settimeout(5)
            assert b"HTTP/1.1 408" in one.recv(4096)
        head = b"POST /echo HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        with opened(port, head) as one:
            began = time.monotonic()
            one.settimeout(0.05)
            said = b""
            while b"408" not in said and time.monotonic() < began + 5:
                one.sendall(b"1\r\na\r\n")
                with contextlib.suppress(TimeoutError):
                    said += one.recv(4096)
            assert b"HTTP/1.1 408" in said
        assert ask(port, "POST", "/echo", b"a" * 900) == (200, 900)
        assert ask(port, "POST", "/echo", b"a" * 1100)[0] == 413


def test_what_was_refused_does_not_drip_on():
    """An answer that came before the whole body does not keep the connection for ever."""
    head = b"POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 500\r\n\r\n"
    with serving(small_app(seconds=0.3)) as port, opened(port, head) as one:
        seconds, said = until_closed(one)
        assert b"408" in said
        assert seconds < 3


def test_half_open_connections_make_room():
    with serving(small_app(), limit=4, seconds=30) as port, contextlib.ExitStack() as stack:
        keep = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        keep.request("GET", "/health")
        keep.getresponse().read()
        halves = [stack.enter_context(opened(port, b"GET /h")) for _ in range(20)]
        assert ask(port) == (200, "ok")
        assert until_closed(halves[0])[0] < 2  # the oldest went first
        keep.request("GET", "/health")  # who has been answered before stays
        assert keep.getresponse().read() == b'"ok"'
        keep.close()


def test_only_where_all_are_being_answered_a_new_one_is_turned_away():
    app, go = small_app(), threading.Event()

    @app.get("/slow")
    def slow() -> str:
        go.wait(10)
        return "done"

    with serving(app, limit=3, seconds=30) as port:
        busy = [opened(port, b"GET /slow HTTP/1.1\r\nHost: localhost\r\n\r\n") for _ in range(3)]
        time.sleep(0.3)
        with opened(port) as one:
            said = until_closed(one)[1]
        assert said.startswith(b"HTTP/1.1 503")
        assert b"Retry-After: 5" in said
        go.set()
        for one in busy:
            one.settimeout(5)
            said = b""
            while b"done" not in said:  # head and body may come in one piece or in two
                piece = one.recv(4096)
                assert piece, said
                said += piece
            one.close()


HOSTS = [
    ("localhost", True), ("localhost:8000", True), ("LOCALHOST:1", True), ("127.0.0.1", True), ("127.0.0.1:80", True),
    ("127.8.9.1", True), ("[::1]", True), ("[::1]:80", True), ("localhost.", True), ("proxy.example:443", True),
    ("evil.example", False), ("evil.example:8000", False), ("localhost.evil.example", False),
    ("127.0.0.1.nip.io", False),
    ("", False), ("0.0.0.0", False), ("10.0.0.1:80", False), ("[fe80::1]", False), ("127.0.0.1@evil.example", False),
    ("evil.example:127.0.0.1", False), ("[", False), ("localhost,evil.example", False),
]  # fmt: skip


@pytest.mark.parametrize(("header", "ours"), HOSTS)
def test_hosts(header, ours):
    assert host_is_ours(header, ["proxy.example"]) is ours


def test_a_foreign_host_is_refused_on_loopback_alone():
    app = small_app()
    check_host(app, "127.0.0.1", ["proxy.example"])
    with serving(app) as port:
        assert ask(port)[0] == 200
        assert ask(port, headers={"Host": "proxy.example"})[0] == 200
        status, answer = ask(port, headers={"Host": "evil.example"})
        assert status == 421
        assert "Host header" in answer["error"]["message"]
        with opened(port, b"GET /health HTTP/1.0\r\n\r\n") as one:
            assert b"421" in until_closed(one)[1]
    assert [is_loopback(one) for one in ("::1", "127.0.0.2", "0.0.0.0", "::", "example")] == [True, True, *[False] * 3]
    open_to_all = small_app()
    check_host(open_to_all, "0.0.0.0")
    with serving(open_to_all) as port:
        assert ask(port, headers={"Host": "evil.example"})[0] == 200


def test_the_limit_leaves_room_for_files(monkeypatch):
    for soft, most in ((128, 48), (1024, 496), (resource.RLIM_INFINITY, 4096), (1 << 20, 4096), (20, 8)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, soft=soft: (soft, soft))
        assert most_connections() == most


def test_two_hundred_half_open_connections_and_few_files(run_folder, importable, monkeypatch):
    """The whole server, with a key and little more than a hundred files: it goes on answering and hardly logs."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    arguments = ("serve-reward", run_folder, "--trust-run", "--api-key-variable", "REWARD_KEY")
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, hard))
    try:
        server = Served(*arguments, cwd=importable, env={"REWARD_KEY": "secret"})
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    with server, contextlib.ExitStack() as stack:
        told = len(server.lines)
        for number in range(200):
            one = stack.enter_context(opened(server.port))
            with contextlib.suppress(OSError):
                one.sendall(b"" if number % 2 else b"POST /get_reward HTTP/1.1\r\nHost: localhost\r\n")
        for _ in range(3):
            began = time.monotonic()
            assert server.get("/health")[0] == 200
            assert time.monotonic() - began < 5
        body = {"query": ["x"], "prompts": ["y"]}
        assert server.post("/get_reward", body)[0] == 401
        key = {"Authorization": "Bearer secret"}
        assert server.post("/get_reward", body, key)[0] == 400  # not a prompt of the run
        assert server.get("/health", {"Host": "evil.example"})[0] == 421
        for odd in (
            {"query": ["x"] * 4097, "prompts": ["y"] * 4097},
            {"query": ["x"], "prompts": ["y"], "labels": [0] * 5000},
            b"[" * 200_000,
            b'{"query": ["x"], "prompts": ["y"], "labels": ' + b"[" * 200_000,
            b'{"query": ' + b"1" * 6000 + b"}",
            b'{"query": ["\\ud83d"], "prompts": ["\\ud83d"]}',
            b"\xff\xfe",
            b"",
        ):
            status, _, answer = server.post("/get_reward", odd, key)
            assert (status, list(answer)) == (400, ["error"]), answer
            assert len(json.dumps(answer)) < 2000
        time.sleep(0.5)
        assert sum(map(len, server.lines[told:])) < 2000, "".join(server.lines[told:])[:2000]


def test_a_key_that_no_header_can_carry(capfd, monkeypatch):
    monkeypatch.setenv("REWARD_KEY", "two\nlines")
    for verb in (["serve-reward", "run"], ["serve", "--model", "m", "--n", "2"]):
        code, _, told = infalign(capfd, monkeypatch, *verb, "--api-key-variable", "REWARD_KEY")
        assert (code, "line break" in told, "two" in told) == (2, True, False), told
