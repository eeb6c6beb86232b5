"""What both servers share: errors as JSON, a limit to what is read, and a server that stops when asked and not before.

FastAPI and uvicorn are the extra `serve`; this module says so where they are missing.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import math
import signal
import socket
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from infalign._io.http import EndpointError, RequestRefusedError
from infalign._io.wording import visible
from infalign.errors import InfalignError, InputError, RewardError
from infalign.select.serving.batcher import BusyError, LateError, StoppingError
from infalign.select.serving.explain import explain

try:
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from starlette.exceptions import HTTPException
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from infalign.select.serving.connections import (
        ACCEPTED_AT_ONCE,
        SECONDS_FOR_BODY,
        Connections,
        host_is_ours,
        is_loopback,
        most_connections,
        patient_protocol,
    )
except ImportError as missing:
    raise InputError(
        f"serving needs FastAPI and uvicorn ({missing})",
        where="infalign.select.serving",
        hint="pip install 'infalign[serve]'",
    ) from missing

Result = TypeVar("Result")
log = logging.getLogger("infalign.select.serving")

_SECONDS_BETWEEN_LOOKS = 0.5
_SECONDS_BETWEEN_LINES = 60.0
_WAITING_TO_BE_ACCEPTED = 1024


def error_response(status: int, message: str, *, kind: str, retry_after: int | None = None) -> JSONResponse:
    """An error in the shape that the OpenAI client reads.

    Args:
        status: HTTP status.
        message: What was wrong, and a hint.
        kind: A word for programs.
        retry_after: Seconds, for the header of that name.
    """
    content = {"error": {"message": message, "type": kind, "param": None, "code": None}}
    headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
    return JSONResponse(content, status_code=status, headers=headers)


def make_app(title: str, *, max_body: int) -> FastAPI:
    """An application that answers every error as JSON and reads no request larger than `max_body` bytes."""
    app = FastAPI(title=title, docs_url=None, redoc_url=None)
    app.add_middleware(BodyLimit, max_body=max_body)

    @app.exception_handler(RequestValidationError)
    async def _wrong_request(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError), "registered for it"
        return error_response(400, explain(error.errors()), kind="invalid_request_error")

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException), "registered for it"
        kind = "invalid_request_error" if error.status_code < 500 else "server_error"
        return error_response(error.status_code, str(error.detail), kind=kind)

    @app.exception_handler(BusyError)
    async def _busy(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, BusyError), "registered for it"
        text = "as many requests as this server takes in are under way; ask again later"
        return error_response(429, text, kind="rate_limit_error", retry_after=error.retry_after)

    @app.exception_handler(StoppingError)
    async def _stopping(request: Request, error: Exception) -> JSONResponse:
        return error_response(503, "the server is stopping", kind="server_error", retry_after=5)

    @app.exception_handler(LateError)
    async def _late(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, LateError), "registered for it"
        told = "was not finished" if error.began else "was not begun"
        return error_response(503, f"the request {told} within the server's time limit", kind="timeout", retry_after=5)

    @app.exception_handler(InfalignError)
    async def _ours(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, InfalignError), "registered for it"
        # What and hint only: where it happened may name the operator's files and machines.
        message = error.what if error.hint is None else f"{error.what}. {error.hint}"
        if isinstance(error, InputError | RequestRefusedError):
            return error_response(400, message, kind="invalid_request_error")
        log.error("%s", visible(str(error)))  # a server behind this one may have put anything into it
        if isinstance(error, EndpointError):
            text = f"the upstream server does not answer: {error.what}"
            return error_response(503, text, kind="upstream_error", retry_after=5)
        if isinstance(error, RewardError):  # other candidates may well be scored; why not these is in the log
            text = "the candidates could not be scored"
            return error_response(503, text, kind="reward_error", retry_after=5)
        return error_response(500, message, kind="server_error")

    @app.exception_handler(Exception)
    async def _fault(request: Request, error: Exception) -> JSONResponse:
        return error_response(500, f"a fault of this server ({type(error).__name__})", kind="server_error")

    return app


class BodyLimit:
    """Refuses a request body above `max_body` bytes with 413, announced or not, and one that drips with 408."""

    def __init__(self, app: ASGIApp, max_body: int, seconds: float = SECONDS_FOR_BODY) -> None:
        self._app = app
        self._max_body = max_body
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        late = asyncio.get_running_loop().time() + self._seconds
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        refusal = error_response(
            413, f"the request is larger than {self._max_body:,} bytes", kind="invalid_request_error"
        )
        if not announced.isdigit() or int(announced) > self._max_body:
            await self._read_on(receive, 0, late)
            await refusal(scope, receive, send)
            return
        read = 0
        refused = whole = False

        async def counted() -> Message:
            nonlocal read, refused, whole
            if whole:  # what comes now is that the client has gone
                return await receive()
            try:
                async with asyncio.timeout_at(late):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"the request took longer than {self._seconds:g} s to come") from None
            whole = not message.get("more_body", False)
            read += len(message.get("body", b""))
            if read > self._max_body and not refused:
                refused = True
                if message.get("more_body", False):
                    await self._read_on(receive, read, late)
                raise HTTPException(413, f"the request is larger than {self._max_body:,} bytes")
            return message

        await self._app(scope, counted, send)

    async def _read_on(self, receive: Receive, read: int, late: float) -> None:
        """Read the rest and drop it, so that the client gets to read the answer; but not without end."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(late):
                while read < 16 * self._max_body:
                    message = await receive()
                    read += len(message.get("body", b""))
                    if message["type"] == "http.disconnect" or not message.get("more_body", False):
                        return


class BearerKey:
    """Refuses requests under a path that do not bring the key, before anything of them is read."""

    def __init__(self, app: ASGIApp, key: str, under: str) -> None:
        self._app = app
        self._wanted = f"Bearer {key}".encode()
        self._under = under

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "http" and scope["path"].startswith(self._under):
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._wanted):
                refusal = error_response(401, "the API key is missing or wrong", kind="authentication_error")
                refusal.headers["WWW-Authenticate"] = "Bearer"
                await refusal(scope, receive, send)
                return
        await self._app(scope, receive, send)


def require_key(app: FastAPI, key: str, *, under: str) -> None:
    """Let only requests with this bearer token reach the paths under `under`."""
    app.add_middleware(BearerKey, key=key, under=under)


class HostCheck:
    """Refuses requests that a browser was led to send here under another machine's name (DNS rebinding)."""

    def __init__(self, app: ASGIApp, allowed: Sequence[str]) -> None:
        self._app = app
        self._allowed = allowed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "http":
            hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
            if len(hosts) != 1 or not host_is_ours(hosts[0], self._allowed):
                text = "the Host header names another machine; this server listens on a loopback address"
                await error_response(421, text, kind="invalid_request_error")(scope, receive, send)
                return
        await self._app(scope, receive, send)


def check_host(app: FastAPI, host: str, allowed: Sequence[str] = ()) -> None:
    """Let only requests to this machine's own names reach a server that listens on a loopback address.

    Args:
        app: What is served.
        host: The address that it listens on; with any other than a loopback address nothing is checked.
        allowed: Further names, as a proxy in front of it may pass on.
    """
    if is_loopback(host):
        app.add_middleware(HostCheck, allowed=allowed)


async def while_connected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is given up once the client has gone.

    Raises:
        HTTPException: The client has gone; nobody reads what is answered.
    """
    task = asyncio.ensure_future(work)
    try:
        while True:
            done, _ = await asyncio.wait({task}, timeout=_SECONDS_BETWEEN_LOOKS)
            if done:
                return task.result()
            if await request.is_disconnected():
                raise HTTPException(499, "the client has gone")
    finally:
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


def listen(host: str, port: int) -> socket.socket:
    """A socket to serve on.

    Raises:
        InputError: If the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=_WAITING_TO_BE_ACCEPTED)
    except (OSError, OverflowError) as error:
        raise InputError(
            f"this address cannot be served on ({error})",
            where=f"{host}:{port}",
            hint="Choose another --host or --port",
        ) from error


def run_app(
    app: FastAPI,
    listener: socket.socket,
    *,
    grace: float,
    on_start: Callable[[], None],
    on_stop: Callable[[], None],
) -> None:
    """Serve until SIGTERM or Ctrl-C; then take in nothing more and finish what is under way.

    Args:
        app: What is served.
        listener: From `listen`.
        grace: Seconds to finish in.
        on_start: Called once requests are answered and signals are heeded.
        on_stop: Called when the signal comes, while requests under way go on.
    """
    limits = Connections(most_connections())
    config = uvicorn.Config(
        app,
        http=patient_protocol(limits),
        ws="none",
        loop="asyncio",
        backlog=ACCEPTED_AT_ONCE,
        log_level="error",  # no line of the log for each request that is none
        access_log=False,
        lifespan="off",
        # Longer than any Retry-After: a connection must not be closed at the moment its client asks again.
        timeout_keep_alive=75,
        timeout_graceful_shutdown=max(1, round(grace)),
    )
    # uvicorn raises the signal again once it has stopped: what was asked for is done, so that must not kill us.
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        _Server(config, on_start, on_stop).run(sockets=[listener])
    finally:
        signal.signal(signal.SIGTERM, before)


def _say_shortly() -> Callable[[asyncio.AbstractEventLoop, dict[str, Any]], None]:
    """What tells of faults in the event loop: that no more files can be opened, in one line now and then."""
    told = -math.inf

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        nonlocal told
        error = context.get("exception")
        if not isinstance(error, OSError):
            loop.default_exception_handler(context)
        elif loop.time() > told + _SECONDS_BETWEEN_LINES:
            told = loop.time()
            log.error("%s (%s)", context.get("message"), error)

    return handle


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, on_start: Callable[[], None], on_stop: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_start = on_start
        self._on_stop = on_stop

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().set_exception_handler(_say_shortly())
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(_WAITING_TO_BE_ACCEPTED)  # asyncio has set it to what is accepted at once
        self._on_start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._on_stop()
        await super().shutdown(sockets)
