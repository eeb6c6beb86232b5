"""JSON over HTTP to servers that are slow, busy, restarting or wrong."""

from __future__ import annotations

import http.client
import json
import os
import random
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from typing import Any

from infalign.errors import InfalignError, InputError
from infalign.wording import counted

_TRY_AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
_WRONG_REQUEST = frozenset({400, 422})
_LONGEST_WAIT = 60.0


class EndpointError(InfalignError):
    """A server could not be reached, or its answer cannot be used."""


class RequestRefusedError(EndpointError):
    """A server says that the request itself is wrong: asking again would not help, asking otherwise may."""


@dataclass(frozen=True)
class Endpoint:
    """Where to post, and how patiently.

    Attributes:
        url: `http://` or `https://` address.
        api_key_variable: Environment variable that holds the key, sent as a bearer token. The key itself is read at
            each request and kept nowhere.
        timeout: Seconds until a request without an answer is given up.
        retries: How many times a request is tried again, after waits that double from `first_wait`.
        first_wait: Seconds.
    """

    url: str
    api_key_variable: str | None = None
    timeout: float = 120.0
    retries: int = 6
    first_wait: float = 0.5

    def __post_init__(self) -> None:
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError("this is not an http address", where=f"endpoint {parts.hostname or self.url!r}")
        if parts.username or parts.password:
            raise InputError(
                "the address holds a password",
                where=f"endpoint {parts.hostname}",
                hint="Put the key into an environment variable and name it as api_key_variable",
            )

    def post(self, path: str, content: dict[str, Any]) -> Any:
        """Post JSON and return the JSON that comes back, trying again while that can help.

        Raises:
            EndpointError: It still failed after the last try, or the server refused it for good.
            RequestRefusedError: The server found the request itself wrong (status 400 or 422).
        """
        address = self.url.rstrip("/") + path
        failure = ""
        for attempt in range(self.retries + 1):
            wait = None
            try:
                return self._once(address, content)
            except urllib.error.HTTPError as error:
                failure = f"status {error.code}: {_beginning(error)}"
                if error.code not in _TRY_AGAIN:
                    refused = RequestRefusedError if error.code in _WRONG_REQUEST else EndpointError
                    raise refused(f"the server refused the request ({failure})", where=address,
                                  hint="Check the address, the model's name and the key") from None  # fmt: skip
                wait = _asked_wait(error)
            except (OSError, http.client.HTTPException) as error:  # timeouts and broken connections among them
                failure = f"{type(error).__name__}: {error}"
            except ValueError:
                failure = "the answer is not JSON"
            if attempt < self.retries:
                doubled = self.first_wait * 2.0**attempt * random.uniform(0.75, 1.25)
                time.sleep(min(_LONGEST_WAIT, doubled if wait is None else wait))
        raise EndpointError(f"no usable answer in {counted(self.retries + 1, 'try', 'tries')} "
                            f"({failure})", where=address,
                            hint="Start again when the server is back: what is done is kept")  # fmt: skip

    def _once(self, address: str, content: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        if self.api_key_variable is not None:
            key = os.environ.get(self.api_key_variable)
            if not key:
                raise EndpointError(f"the environment variable {self.api_key_variable} is not set", where=address)
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(address, json.dumps(content).encode(), headers)
        with urllib.request.urlopen(request, timeout=self.timeout) as answer:
            return json.loads(answer.read().decode("utf-8"))


def _beginning(error: urllib.error.HTTPError) -> str:
    try:
        return error.read(300).decode("utf-8", "replace").strip() or str(error.reason)
    except (OSError, http.client.HTTPException):
        return str(error.reason)


def _asked_wait(error: urllib.error.HTTPError) -> float | None:
    """Seconds that the server asks to wait; None where it does not say."""
    try:
        return max(0.0, float(error.headers.get("Retry-After", "")))
    except ValueError:
        return None
