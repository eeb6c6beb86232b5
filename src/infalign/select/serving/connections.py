"""How many connections a server keeps open, and how long a client may take to send a request.

Whoever only opens connections must not shut out those who ask. Above the limit the connection that has waited longest
without a whole request is closed to make room; only if every one is being answered is the new one turned away.
"""

from __future__ import annotations

import asyncio
import ipaddress
import sys
from collections.abc import Sequence
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

SECONDS_FOR_HEADERS = 10.0
SECONDS_FOR_BODY = 60.0
MOST = 4096
ACCEPTED_AT_ONCE = 16  # so that the files of a burst are never open before the limit is looked at
_BUSY = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 5\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


def most_connections() -> int:
    """How many connections the limit on open files allows, with room for models, stores and requests upstream."""
    if sys.platform == "win32":
        return 256
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST if soft == resource.RLIM_INFINITY else max(8, min(MOST, (soft - 32) // 2))


class Connections:
    """The open connections of one server.

    Args:
        limit: How many there may be.
        seconds: How long a client may take to send a request's headers.
    """

    def __init__(self, limit: int, seconds: float = SECONDS_FOR_HEADERS) -> None:
        self.limit = limit
        self.seconds = seconds
        self._open: dict[PatientProtocol, None] = {}  # in the order in which they were opened

    def admit(self, new: PatientProtocol) -> bool:
        """Take in a connection, closing another if there are too many; False if there is no room."""
        if len(self._open) >= self.limit:
            waiting = [one for one in self._open if one.is_waiting]
            if not waiting:
                return False
            # Strangers first: who has been answered before is likely to ask again.
            victim = min(waiting, key=lambda one: one.has_asked)
            self.remove(victim)
            victim.transport.abort()
        self._open[new] = None
        return True

    def remove(self, one: PatientProtocol) -> None:
        """Forget a connection."""
        self._open.pop(one, None)


class PatientProtocol(H11Protocol):
    """uvicorn's HTTP protocol with a limit to its patience. `connections` is set by the server."""

    limits: Connections

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.has_asked = False
        self._timer: asyncio.TimerHandle | None = None

    @property
    def is_waiting(self) -> bool:
        """Whether the next thing has to come from the client: nothing is lost that was worked on."""
        return self.conn.their_state in (h11.IDLE, h11.SEND_BODY)

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """A client has connected."""
        super().connection_made(transport)
        if self.limits.admit(self):
            self._arm()
        else:
            transport.write(_BUSY)
            transport.close()

    def data_received(self, data: bytes) -> None:
        """Some bytes came."""
        super().data_received(data)
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self._arm()  # a part of a request's headers
        else:
            self.has_asked = True
            self._disarm()

    def on_response_complete(self) -> None:
        """An answer has been sent; if it was sent before the whole request came, the rest must not drip for ever."""
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY:
            self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is closed."""
        self._disarm()
        self.limits.remove(self)
        super().connection_lost(exc)

    def _arm(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(self.limits.seconds, self._give_up)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        self._timer = None
        self.transport.abort()


def patient_protocol(limits: Connections) -> type[PatientProtocol]:
    """The protocol of one server."""
    return type("_Protocol", (PatientProtocol,), {"limits": limits})


def is_loopback(host: str) -> bool:
    """Whether an address to listen on can be reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def host_is_ours(header: str, allowed: Sequence[str] = ()) -> bool:
    """Whether a request's Host header names this machine as its loopback address does, or an allowed name."""
    host = header.strip().lower()
    if host.startswith("["):
        name = host[1:].partition("]")[0]
    else:
        name = host.rpartition(":")[0] if host.count(":") == 1 else host
    name = name.rstrip(".")
    return is_loopback(name) or name in {one.lower() for one in allowed}
