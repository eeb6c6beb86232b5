"""JSON over HTTP to servers that are slow, busy, restarting or wrong."""

from __future__ import annotations

import email.utils
import http.client
import json
import os
import random
import re
import ssl
import time
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC
from typing import Any

from infalign._io.one_request import Answer, TooLargeError, post
from infalign._io.outside import outside_text
from infalign._io.threads import pause, time_left
from infalign._io.wording import counted
from infalign.errors import InfalignError, InputError

_TRY_AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
_WRONG_REQUEST = frozenset({400, 422})
_ABOUT_THE_KEY = frozenset({401, 403, 407})
_LONGEST_WAIT = 60.0
_LARGEST = 64 << 20
_key_variables: set[str] = set()
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_LIKE_A_KEY = re.compile(r"(?:sk|pk|hf|gsk|xai|ghp|gho|glpat|nvapi|AKIA|AIza|eyJ)[-_]?[A-Za-z0-9_]{12,}")


class EndpointError(InfalignError):
    """A server could not be reached, or its answer cannot be used.

    Args:
        what: What was wrong, in our own words.
        where: The server's address.
        hint: What to do about it.
        said: What the server said, cut by `outside_text`; for who runs this program, and never for clients of it.
    """

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None, said: str = "") -> None:
        super().__init__(what, where=where, hint=hint)
        self.said = said

    def __str__(self) -> str:
        what = f"{self.what} ({self.said})" if self.said else self.what
        text = f"{self.where}: {what}" if self.where else what
        return f"{text}. {self.hint}" if self.hint else text


class RequestRefusedError(EndpointError):
    """A server says that the request itself is wrong: asking again would not help, asking otherwise may."""


@dataclass(frozen=True)
class Endpoint:
    """Where to post, and how patiently.

    Nothing is sent to any other host: redirects are not followed. (A proxy that the environment names, as in
    `HTTPS_PROXY`, is used.)

    Attributes:
        url: `http://` or `https://` address, without a query, user name or password.
        api_key_variable: Environment variable that holds the key, sent as a bearer token. The key itself is read at
            each request and kept nowhere.
        timeout: Seconds until a request is given up, from looking up the name to the last byte of the answer.
        retries: How many times a request is tried again, after waits that double from `first_wait`.
        first_wait: Seconds.

    Raises:
        InputError: The address is none, or holds a key; the variable's name is none, or its key has a line break or
            another letter that cannot be sent.
    """

    url: str
    api_key_variable: str | None = None
    timeout: float = 120.0
    retries: int = 6
    first_wait: float = 0.5

    def __post_init__(self) -> None:
        check_address(self.url)
        check_variable(self.api_key_variable)
        if self.api_key_variable is not None:
            _key_variables.add(self.api_key_variable)
            if os.environ.get(self.api_key_variable):
                self.key()

    def key(self) -> str | None:
        """The key, from the environment; None without a variable.

        Raises:
            EndpointError: The variable is not set.
            InputError: The key cannot be sent.
        """
        if self.api_key_variable is None:
            return None
        key = os.environ.get(self.api_key_variable)
        if not key:
            raise EndpointError(f"the environment variable {self.api_key_variable} is not set", where=self.url)
        if not all("!" <= letter <= "~" for letter in key):
            odd = "a line break" if "\n" in key or "\r" in key else "a space or another letter that cannot be sent"
            raise InputError(f"the key in the environment variable {self.api_key_variable} has {odd}",
                             where=self.url, hint="Set it again, to the key alone")  # fmt: skip
        return key

    def post(self, path: str, content: Mapping[str, Any], *, largest: int = _LARGEST) -> Any:
        """Post JSON and return the JSON that comes back, trying again while that can help.

        Args:
            path: Put behind the address.
            content: What to post.
            largest: Bytes of the largest answer.

        Raises:
            EndpointError: It still failed after the last try, or the server refused it for good, or no time is left
                (`time_limit`).
            RequestRefusedError: The server found the request itself wrong (status 400 or 422).
            InputError: The key cannot be sent.
        """
        address = self.url.rstrip("/") + path
        body = json.dumps(content).encode()
        failure, said = "", ""
        for attempt in range(self.retries + 1):
            wait = None
            try:
                answer = self._once(address, body, largest)
            except TooLargeError:
                raise EndpointError(f"the answer is larger than {largest:,} bytes", where=address,
                                    hint="Check that this is the right server") from None  # fmt: skip
            except ssl.SSLCertVerificationError as error:
                raise EndpointError("the server's certificate is not trusted", where=address,
                                    said=self._cut(str(error))) from None  # fmt: skip
            except (OSError, http.client.HTTPException) as error:  # timeouts and broken connections among them
                failure, said = "", self._cut(f"{type(error).__name__}: {error}")
            else:
                if 200 <= answer.status < 300:
                    try:
                        return json.loads(answer.body.decode("utf-8-sig"))
                    except (ValueError, RecursionError):
                        failure, said = " (the answer is not JSON)", ""
                else:
                    self._require_passing(answer, address)
                    failure, said = f" (status {answer.status})", self._told(answer)
                    wait = _asked_wait(answer)
            if attempt < self.retries:
                doubled = self.first_wait * 2.0**attempt * random.uniform(0.75, 1.25)
                seconds = min(_LONGEST_WAIT, doubled if wait is None else wait)
                if seconds >= time_left() or not pause(seconds):
                    raise EndpointError(f"no usable answer in time{failure}", where=address, said=said)
        raise EndpointError(f"no usable answer in {counted(self.retries + 1, 'try', 'tries')}{failure}",
                            where=address, said=said,
                            hint="Start again when the server is back: what is done is kept")  # fmt: skip

    def _once(self, address: str, body: bytes, largest: int) -> Answer:
        headers = {"Content-Type": "application/json"}
        if (key := self.key()) is not None:
            headers["Authorization"] = f"Bearer {key}"
        seconds = min(self.timeout, time_left())
        if seconds <= 0.0:
            raise TimeoutError("the time is over")
        return post(address, headers, body, seconds=seconds, largest=largest)

    def _require_passing(self, answer: Answer, address: str) -> None:
        """Raise unless asking again can help."""
        status = answer.status
        if status in _TRY_AGAIN:
            return
        if 300 <= status < 400:
            raise EndpointError(f"the server sends this request on to another address (status {status})", where=address,
                                hint="Redirects are not followed; give the server's own address")  # fmt: skip
        hint, said = "Check the address, the model's name and the key", self._told(answer)
        if status in _WRONG_REQUEST:
            raise RequestRefusedError(
                f"the server refused the request (status {status}{said and ': '}{said})", where=address, hint=hint
            )
        told = f": {said}" if said else ""
        raise EndpointError("the server refused the request", said=f"status {status}{told}", where=address, hint=hint)

    def _told(self, answer: Answer) -> str:
        """The beginning of an error's body; of one about the key nothing, for the key may be in it."""
        return "" if answer.status in _ABOUT_THE_KEY else self._cut(answer.body)

    def _cut(self, text: str | bytes) -> str:
        return outside_text(text, known_keys())


def known_keys() -> list[str]:
    """The keys of all servers that this process has been told of: what is cut out of all that servers say."""
    return [key for name in sorted(_key_variables) if (key := os.environ.get(name))]


def check_address(url: str) -> None:
    """Raise InputError unless `url` is an http address that holds no key; the message holds none either."""
    try:
        parts = urllib.parse.urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        parts, host, port = urllib.parse.urlsplit(""), None, None
    proper = url.isascii() and url.isprintable() and " " not in url and port != 0
    if parts.scheme not in ("http", "https") or not host or not proper:
        shown = host or outside_text(re.split("[?#]", url)[0].rpartition("@")[2])
        raise InputError("this is not an http address", where=f"endpoint {shown!r}",
                         hint="Write it as http://host:port/v1")  # fmt: skip
    hint = "Put the key into an environment variable and name it as api_key_variable"
    if "@" in parts.netloc:
        raise InputError("the address holds a user name or password", where=f"endpoint {host}", hint=hint)
    if "?" in url or "#" in url:
        raise InputError("the address holds a query, where keys do not belong", where=f"endpoint {host}", hint=hint)


def check_variable(name: str | None) -> None:
    """Raise InputError unless `name` can be that of an environment variable, and does not look like a key itself."""
    if name is not None and (not _VARIABLE.fullmatch(name) or _LIKE_A_KEY.fullmatch(name)):
        raise InputError("this is not the name of an environment variable, but perhaps a key", where="api_key_variable",
                         hint="Put the key into an environment variable, and give that variable's name")  # fmt: skip


def _asked_wait(answer: Answer) -> float | None:
    """Seconds that the server asks to wait, as a number or as a date; None where it does not say."""
    asked = answer.headers.get("Retry-After", "").strip()
    try:
        seconds = float(asked)
        return max(0.0, seconds) if seconds == seconds else None
    except ValueError:
        pass
    try:
        date = email.utils.parsedate_to_datetime(asked)
        return max(0.0, (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None
