"""A real HTTP server, in this process, that offers models under names in the words of OpenAI's protocol."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from infalign.rollouts.batches import Missing
from infalign.rollouts.policy import LocalPolicy


class ServedModels:
    """Serves `/v1/completions`; `requests` and `choices` count what each model was asked for.

    Args:
        models: Policies by name.
        scores: How prompt log-probabilities are given: "echo", "prompt_logprobs", or None: not at all.
    """

    def __init__(self, models: Mapping[str, LocalPolicy], scores: str | None = None) -> None:
        self.models, self.scores = models, scores
        self.choices: Counter[str] = Counter()
        self.requests: Counter[str] = Counter()
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                try:
                    status, answer = 200, outer.answer(content)
                except (KeyError, ValueError) as error:
                    status, answer = 400, {"error": {"message": str(error)}}
                body = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def answer(self, content: dict[str, Any]) -> dict[str, Any]:
        name = content["model"]
        if name not in self.models:
            raise KeyError(f"no model {name}")
        policy, prompt = self.models[name], content["prompt"]
        if "echo" in content or "prompt_logprobs" in content:
            return self._scored(policy, prompt, content)
        ids = policy.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
        key = policy.key(max_new_tokens=content["max_tokens"], seed=content["seed"])
        with self._lock:
            self.requests[name] += 1
            self.choices[name] += content["n"]
            (rows,) = policy.draw_rows([Missing("asked", ids, list(range(content["n"])))], key, content["n"])
        choices = [
            {"index": i, "text": text, "finish_reason": reason, "message": {"role": "assistant", "content": text}}
            for i, (text, reason) in enumerate(zip(rows["text"], rows["finish_reason"], strict=True))
        ]
        return {"choices": choices, "usage": {"completion_tokens": sum(rows["num_tokens"])}}

    def _scored(self, policy: LocalPolicy, ids: list[int], content: dict[str, Any]) -> dict[str, Any]:
        if self.scores is None or self.scores not in content:
            raise ValueError("this server gives no log-probabilities of prompts")
        rest = range(1, len(ids))
        whole = policy.logprobs([ids[:1]] * len(rest), [ids[1 : at + 1] for at in rest])
        each = [float(after - before) for before, after in zip([0.0, *whole], whole, strict=False)]
        choice: dict[str, Any] = {"index": 0, "text": "", "finish_reason": "length"}
        if self.scores == "echo":
            choice["logprobs"] = {"token_logprobs": [None, *each, -1.0]}  # and one token more, as vLLM gives it
        else:
            tables = [{str(token): {"logprob": value}} for token, value in zip(ids[1:], each, strict=True)]
            choice["prompt_logprobs"] = [None, *tables]
        return {"choices": [choice]}

    def __enter__(self) -> ServedModels:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
