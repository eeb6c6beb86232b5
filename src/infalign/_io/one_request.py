"""One POST over HTTP: done within a time or given up, no larger than a limit, and never sent on to another host.

The standard library's timeouts, like those of httpx, are for each read of a socket, so that a server that sends a byte
now and then holds its client for ever. Here the request runs in a thread of its own, and who waits for it leaves on
time; closing the connection ends the thread.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from email.message import Message
from queue import Empty, SimpleQueue
from typing import Any

_PIECE = 1 << 16
_LARGEST_REFUSAL = 1 << 14


class TooLargeError(Exception):
    """The answer is larger than the limit."""


@dataclass(frozen=True)
class Answer:
    """What a server answered.

    Attributes:
        status: HTTP status.
        headers: Headers.
        body: The whole body where the status is 2xx; else its beginning.
    """

    status: int
    headers: Message
    body: bytes


def post(address: str, headers: Mapping[str, str], body: bytes, *, seconds: float, largest: int) -> Answer:
    """Post, and read the answer.

    Proxies that the environment names are used. Redirects are answers like others.

    Args:
        address: Where to.
        headers: Headers.
        body: What to post.
        seconds: For the whole of it: looking up the name, connecting, sending, and reading to the last byte.
        largest: Bytes of the largest answer.

    Raises:
        TooLargeError: The answer is larger.
        OSError: It could not be had; TimeoutError where the time is over.
        HTTPException: What came is not HTTP, or was cut off.
    """
    exchange = _Exchange(urllib.request.Request(address, body, dict(headers), method="POST"), seconds, largest)
    try:
        threading.Thread(target=exchange.run, daemon=True).start()
    except RuntimeError as error:  # as many threads as the machine allows
        raise OSError(str(error)) from error
    try:
        found = exchange.outcome.get(timeout=seconds)
    except Empty:
        raise TimeoutError(f"no whole answer within {seconds:,.3g} s") from None
    finally:
        exchange.close()
    if isinstance(found, Answer):
        return found
    raise found.reason if isinstance(found, urllib.error.URLError) and isinstance(found.reason, OSError) else found


class _Exchange:
    """A request under way in one thread, which another may close."""

    def __init__(self, request: urllib.request.Request, seconds: float, largest: int) -> None:
        self.outcome: SimpleQueue[Answer | Exception] = SimpleQueue()
        self._request, self._seconds, self._largest = request, seconds, largest
        self._sockets: list[socket.socket] = []
        self._closed = False

    def run(self) -> None:
        try:
            self.outcome.put(self._read())
        except Exception as error:
            self.outcome.put(error)

    def _read(self) -> Answer:
        opener = urllib.request.OpenerDirector()  # without the handlers of redirects, files, ftp and errors
        for handler in (urllib.request.ProxyHandler(), _Connections(self)):
            opener.add_handler(handler)
        with opener.open(self._request, timeout=self._seconds) as response:
            good = 200 <= response.status < 300
            limit = self._largest if good else _LARGEST_REFUSAL
            announced = response.length
            if good and announced is not None and announced > limit:
                raise TooLargeError
            pieces, read = [], 0
            while read <= limit and (piece := response.read1(_PIECE)):
                pieces.append(piece)
                read += len(piece)
            if read > limit and good:
                raise TooLargeError
            if good and response.length:
                raise http.client.IncompleteRead(b"", response.length)
            return Answer(response.status, response.headers, b"".join(pieces)[:limit])

    def opened(self, connected: socket.socket) -> None:
        self._sockets.append(connected)
        if self._closed:
            self.close()

    def close(self) -> None:
        self._closed = True
        for one in self._sockets:
            with contextlib.suppress(OSError, ValueError):
                one.shutdown(socket.SHUT_RDWR)


class _Connections(urllib.request.HTTPSHandler):
    """Opens connections that an exchange can close."""

    def __init__(self, exchange: _Exchange) -> None:
        super().__init__()
        self._exchange = exchange

    http_request = urllib.request.HTTPSHandler.https_request

    def http_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(self._closable(http.client.HTTPConnection), req)

    def https_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(self._closable(http.client.HTTPSConnection), req, context=ssl.create_default_context())

    def _closable(self, kind: type[http.client.HTTPConnection]) -> Any:
        exchange = self._exchange

        class Closable(kind):
            def connect(self) -> None:
                super().connect()
                exchange.opened(self.sock)

        return Closable
