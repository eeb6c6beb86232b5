"""A server on a real socket that answers each request by whatever bytes a test plans, and the plans themselves."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
import time

PATIENCE = 0.4  # seconds that the tests' endpoints wait for a whole answer


class Request:
    """What came."""

    def __init__(self, number, path, headers, content):
        self.number, self.path, self.headers, self.content = number, path, headers, content
        self.at = time.monotonic()

    @property
    def asked(self):
        """The prompt's text."""
        content = self.content
        return content.get("prompt") or (content["messages"][-1]["content"] if "messages" in content else None)


class FaultyServer:
    """Hands each request and its connection to `plan`; keeps the requests."""

    def __init__(self, plan):
        self.plan, self.requests, self._lock = plan, [], threading.Lock()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self._closing = threading.Event()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self):
        while True:
            connection, _ = self._socket.accept()
            if self._closing.is_set():
                connection.close()
                return
            thread = threading.Thread(target=self._serve, args=(connection,))
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection):
        connection.settimeout(20)
        with connection, contextlib.suppress(OSError):
            head = b""
            while b"\r\n\r\n" not in head:
                got = connection.recv(65536)
                if not got:
                    return
                head += got
            head, _, body = head.partition(b"\r\n\r\n")
            first, *lines = head.decode().split("\r\n")
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
            while len(body) < int(headers.get("content-length", 0)):
                body += connection.recv(65536)
            with self._lock:
                request = Request(len(self.requests), first.split()[1], headers, json.loads(body) if body else None)
                self.requests.append(request)
            self.plan(connection, request)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._closing.set()
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
        self._threads[0].join(5)
        self._socket.close()
        for thread in self._threads[1:]:
            thread.join(5)
            assert not thread.is_alive(), "the client went on with a request that it had given up"


# --- what is sent -----------------------------------------------------------------------------------------------------


def message(status, body=b"", headers=(), *, length=True):
    """An answer as bytes."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status} Status", *(f"{name}: {value}" for name, value in dict(headers).items())]
    if length:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


def sent(*pieces):
    """A plan that sends these bytes, waits where a piece is a number of seconds, and closes."""

    def plan(connection, request):
        for piece in pieces:
            if isinstance(piece, bytes):
                connection.sendall(piece)
            else:
                time.sleep(piece)

    return plan


def answered(status, body=b"", **headers):
    return sent(message(status, body, {name.replace("_", "-"): value for name, value in headers.items()}))


def choices(*given, **more):
    """A plan that gives these choices; those that are text end by themselves."""
    made = [{"text": one, "finish_reason": "stop"} if isinstance(one, str) else one for one in given]
    return answered(200, {"choices": made, **more})


def good(connection, request):
    """As many choices as are asked for, or as many rewards."""
    if "completions" in request.content:
        body = {"rewards": [float(len(text)) for text in request.content["completions"]]}
    else:
        texts = [f"{request.asked}{request.content['seed']}{i}" for i in range(request.content["n"])]
        body = {"choices": [
            {"text": text, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"} for text in texts
        ]}  # fmt: skip
    connection.sendall(message(200, body))


def first(plan, then=good):
    """One plan for the first request, another for the rest."""
    return lambda connection, request: (plan if request.number == 0 else then)(connection, request)


def at_most(n, status=400, body=b"n is too large"):
    """A server that gives no more than n choices in one answer."""

    def plan(connection, request):
        too_many = request.content["n"] > n
        (answered(status, body) if too_many else good)(connection, request)

    return plan


def drip(start, piece, every=0.05):
    """Sends a little again and again: no single read ever waits for long."""

    def plan(connection, request):
        connection.sendall(start)
        for _ in range(400):
            connection.sendall(piece)
            time.sleep(every)

    return plan


def flood(start, piece, total=400 << 20):
    """Sends much, as fast as it is taken; `flood.sent` tells how much."""

    def plan(connection, request):
        connection.sendall(start)
        for _ in range(total // len(piece)):
            connection.sendall(piece)
            plan.sent += len(piece)

    plan.sent = 0
    return plan


def silent(connection, request):
    """Says nothing until the client goes."""
    connection.recv(1)


def reset(connection, request):
    """Ends the connection the hard way."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def quiet_after(start):
    def plan(connection, request):
        connection.sendall(start)
        silent(connection, request)

    return plan
