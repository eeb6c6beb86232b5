"""A server of ours in a process of its own, as a user starts it."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request


class Served:
    """`infalign …` on a free port; `url` once it listens."""

    def __init__(self, *arguments, cwd=None, env=None, port=0):
        command = [sys.executable, "-W", "ignore", "-m", "infalign", *map(str, arguments), "--port", str(port)]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            cwd=cwd,
            env={**os.environ, **(env or {})},
        )
        self.lines, self.url = [], None
        for line in self.process.stderr:
            self.lines.append(line)
            if found := re.search(r"Serving on (http://[^/]+)", line):
                self.url = found[1]
                break
        assert self.url, "".join(self.lines)
        # Somebody must go on reading, or the server stands still once the pipe is full.
        self._reader = threading.Thread(target=lambda: self.lines.extend(self.process.stderr), daemon=True)
        self._reader.start()

    @property
    def port(self):
        return int(self.url.rsplit(":", 1)[1])

    def post(self, path, content, headers=None, timeout=60):
        """Status, headers and JSON of an answer; content may be bytes."""
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        request = urllib.request.Request(self.url + path, body, {"Content-Type": "application/json", **(headers or {})})
        return _answer(request, timeout)

    def get(self, path, headers=None, timeout=60):
        return _answer(urllib.request.Request(self.url + path, headers=headers or {}), timeout)

    def stop(self, sign=signal.SIGTERM, timeout=60):
        """Exit status after a signal."""
        self.process.send_signal(sign)
        status = self.process.wait(timeout)
        self._reader.join(timeout)
        return status

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._reader.join(5)
        self.process.stderr.close()


def _answer(request, timeout):
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return answer.status, dict(answer.headers), json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, dict(error.headers), json.loads(error.read())
