"""An OpenAI-compatible server that misbehaves in every way named, and a reward server: real sockets, planned faults."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import AutoModelForCausalLM, AutoTokenizer

from infalign._io.http import Endpoint, EndpointError
from infalign.errors import InputError, MismatchError, RewardError
from infalign.rewards.score import HTTPReward
from infalign.rollouts.endpoint import sample_endpoint
from infalign.rollouts.key import RolloutKey
from infalign.rollouts.prompts import Prompt
from infalign.rollouts.store import RolloutStore
from infalign.run.testbed.tokenizer import EOS_TOKEN
from infalign.run.testbed.toy import random_llama

KEY = RolloutKey("endpoint:toy", "none", max_new_tokens=5, seed=3, sampler="openai")
PROMPTS = [Prompt(f"prompt {i}") for i in range(6)]


class Server:
    """Answers with `answer(number of the request, path, content, headers)` -> (status, headers, body bytes)."""

    def __init__(self, answer: Callable, port: int = 0) -> None:
        outer = self
        self.answer, self.count, self.lock = answer, 0, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    number = outer.count
                    outer.count += 1
                status, headers, body = outer.answer(number, self.path, content, self.headers)
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass

            def handle(self):
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client gave up, as it should
                    super().handle()

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def choices(content, n=None, reason="stop"):
    text = content.get("prompt") or content["messages"][-1]["content"]
    made = []
    for i in range(content["n"] if n is None else n):
        said = f"{text}/{content['seed']}/{i}"
        made.append({"text": said} if "prompt" in content else {"message": {"role": "assistant", "content": said}})
        made[-1]["finish_reason"] = reason
    return 200, {}, json.dumps({"choices": made}).encode()


def endpoint(server, **changes):
    return Endpoint(server.url, **{"timeout": 5.0, "retries": 4, "first_wait": 0.01, **changes})


def draw(server, path, prompts=PROMPTS, num_samples=4, **changes):
    store = RolloutStore.open(path, KEY)
    return store, sample_endpoint(endpoint(server, **changes), "toy", prompts, num_samples, store=store, concurrency=3)


def test_all_rollouts_of_a_prompt_in_one_request(tmp_path):
    asked = []

    def answer(number, path, content, headers):
        asked.append((path, content))
        return choices(content)

    with Server(answer) as server:
        store, drawn = draw(server, tmp_path / "store")
        assert drawn == 24
        assert len(asked) == 6
        path, content = asked[0]
        assert path == "/v1/completions"
        assert (content["n"], content["max_tokens"], content["temperature"], content["top_p"]) == (4, 5, 1.0, 1.0)
        texts = store.column_PK("text", [p.id for p in PROMPTS], 4)
        assert len(set(texts.ravel())) == 24
        assert all(text.startswith(p.prompt) for p, row in zip(PROMPTS, texts, strict=True) for text in row)
        with pytest.raises(InputError, match="24 rollouts have no logprob"):
            store.column_PK("logprob", [p.id for p in PROMPTS], 4)
        # Started again it has nothing to do; more samples are only the new ones.
        assert draw(server, tmp_path / "store")[1] == 0
        assert draw(server, tmp_path / "store", num_samples=5)[1] == 6


def test_messages_and_token_counts(tmp_path):
    chat = Prompt([{"role": "user", "content": "Hi"}])
    paths = []

    def answer(number, path, content, headers):
        paths.append(path)
        return choices(content, reason="stop" if number else "length")

    with Server(answer) as server:
        store = RolloutStore.open(tmp_path / "store", KEY)
        for k in (1, 2):
            sample_endpoint(
                endpoint(server), "toy", [chat], k, store=store, count_tokens=lambda text: len(text.split("/"))
            )
        assert store.column_PK("num_tokens", [chat.id], 2).tolist() == [[3, 4]]  # the second with its end token
    assert paths == ["/v1/chat/completions"] * 2


def test_a_server_that_ignores_n_is_asked_singly(tmp_path):
    with Server(lambda number, path, content, headers: choices(content, n=1)) as server:
        store, drawn = draw(server, tmp_path / "store")
        assert drawn == server.count == 24
    assert len(set(store.column_PK("text", [p.id for p in PROMPTS], 4).ravel())) == 24


@pytest.mark.parametrize(
    "fault",
    [
        (429, {"Retry-After": "0.02"}, b"slow down"),
        (500, {}, b"oops"),
        (503, {}, b""),
        (200, {}, b"{not json"),
        (200, {}, b"\xff\xfe"),
        (200, {"Content-Length": "1000"}, b"cut"),  # the connection ends before the answer does
    ],
    ids=["429", "500", "503", "malformed", "not UTF-8", "cut off"],
)
def test_passing_faults_are_outlived(tmp_path, fault):
    def answer(number, path, content, headers):
        if number % 3:
            return choices(content)
        if "1000" in fault[1].values():
            time.sleep(0.01)
        return fault

    with Server(answer) as server:
        store, drawn = draw(server, tmp_path / "store", timeout=0.5)
    assert drawn == len(store) == 24


def test_a_time_out_is_outlived(tmp_path):
    def answer(number, path, content, headers):
        if number == 0:
            time.sleep(0.6)
        return choices(content)

    with Server(answer) as server:
        assert draw(server, tmp_path / "store", timeout=0.3)[1] == 24


def test_a_server_that_dies_keeps_what_was_drawn_and_can_come_back(tmp_path):
    broken = threading.Event()

    def answer(number, path, content, headers):
        if number >= 3 and not broken.is_set():
            return 500, {}, b"out of memory"
        return choices(content)

    with Server(answer) as server:
        port = server.port
        with pytest.raises(EndpointError, match=r"3 of 6 prompts could not be finished; the first: .*out of memory"):
            draw(server, tmp_path / "store", retries=1)
    assert len(RolloutStore.read(tmp_path / "store")) == 12
    # Nobody listens now.
    with pytest.raises(EndpointError, match="no usable answer in 2 tries"):
        draw(server, tmp_path / "store", retries=1)
    broken.set()
    with Server(answer, port) as server:
        assert draw(server, tmp_path / "store")[1] == 12


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error": "x"}', "the answer has no choices"),
        (b'{"choices": []}', "no finished choice"),
        (b'{"choices": [{"text": "a", "finish_reason": "abort"}]}', "no finished choice"),
        (b'{"choices": [{"text": null, "finish_reason": "stop"}, 3]}', "no finished choice"),
    ],
)
def test_answers_without_a_usable_choice_are_reported(tmp_path, body, message):
    with (
        Server(lambda *request: (200, {}, body)) as server,
        pytest.raises(EndpointError, match=f"6 of 6 prompts.*{message}"),
    ):
        draw(server, tmp_path / "store", retries=1)


def test_a_refused_request_is_not_repeated(tmp_path):
    with Server(lambda *request: (404, {}, b"no such model")) as server:
        with pytest.raises(EndpointError, match="status 404: no such model"):
            draw(server, tmp_path / "store", prompts=PROMPTS[:1])
        assert server.count == 1


def test_the_key_comes_from_the_environment_and_goes_nowhere_else(tmp_path, monkeypatch):
    seen = []

    def answer(number, path, content, headers):
        seen.append(headers["Authorization"])
        return choices(content) if number else (401, {}, b"who are you")

    with Server(answer) as server:
        monkeypatch.delenv("TOY_KEY", raising=False)
        with pytest.raises(EndpointError, match="TOY_KEY is not set"):
            draw(server, tmp_path / "store", api_key_variable="TOY_KEY")
        monkeypatch.setenv("TOY_KEY", "very-secret")
        with pytest.raises(EndpointError) as caught:
            draw(server, tmp_path / "store", prompts=PROMPTS[:1], api_key_variable="TOY_KEY")
        assert "very-secret" not in str(caught.value)
        draw(server, tmp_path / "store", api_key_variable="TOY_KEY")
        assert seen[-1] == "Bearer very-secret"
    for file in (tmp_path / "store").rglob("*"):
        assert not file.is_file() or b"very-secret" not in file.read_bytes()
    with pytest.raises(InputError, match="password") as caught:
        Endpoint("http://me:very-secret@example.org/v1")
    assert "very-secret" not in str(caught.value)
    with pytest.raises(InputError, match="not an http address"):
        Endpoint("ftp://example.org")


def test_stores_of_other_samplers_are_refused(tmp_path):
    store = RolloutStore.open(tmp_path / "store", RolloutKey("m", "t", 5, 3))
    with pytest.raises(MismatchError, match="transformers"):
        sample_endpoint(Endpoint("http://127.0.0.1:9/v1"), "toy", PROMPTS, 1, store=store)


def test_a_reward_server():
    def answer(number, path, content, headers):
        assert path == "/v1"
        if "broken" in content["completions"]:
            return 500, {}, b"cannot"
        return 200, {}, json.dumps({"rewards": [len(c) or None for c in content["completions"]]}).encode()

    with Server(answer) as server:
        source = HTTPReward(endpoint(server, retries=1), name="lengths-v1", batch_size=2)
        scores = source.score_rows(["p"] * 5, ["a", "", "ccc", "broken", "e"])
        np.testing.assert_array_equal(scores.rewards, [1, np.nan, np.nan, np.nan, 1])
        assert scores.errors[1] == "it returned no reward"
        assert "cannot" in scores.errors[3]
        assert scores.errors[0] is None
    for body, message in (
        (b'{"rewards": [1]}', "1 reward for 2"),
        (b'{"rewards": [1, NaN]}', "row 1: the reward is nan"),
    ):
        with Server(lambda *request, body=body: (200, {}, body)) as server, pytest.raises(RewardError, match=message):
            HTTPReward(endpoint(server), name="bad").score(["p", "q"], ["a", "b"])
    with Server(lambda *request: (200, {}, b'{"rewards": [NaN]}')) as server:
        source = HTTPReward(endpoint(server), name="bad", batch_size=1)
        with pytest.raises(RewardError, match=r"to prompt id-[12]: the reward is nan"):
            source.score_rows(["p", "q"], ["a", "b"], prompt_id=["id-1", "id-2"])


def test_a_server_is_told_to_sample_the_policy_itself(tmp_path):
    """One that knows neither of two ways is refused, since what it adds to its sampling is unknown."""
    seen = []

    def strict(known):
        def answer(number, path, content, headers):
            extra = set(content) - {"model", "n", "max_tokens", "temperature", "top_p", "seed", "prompt"}
            seen.append(extra)
            return choices(content) if extra <= known else (422, {}, f"unexpected {sorted(extra)}".encode())

        return answer

    with Server(strict({"generation_config"})) as server:
        assert draw(server, tmp_path / "serve")[1] == 24
        asked = [extra for extra in seen if extra == {"generation_config"}]
        assert len(asked) == 6
        assert len(seen) - len(asked) <= 6  # found out once, or by each of the requests already under way
    seen.clear()
    with Server(strict({"top_k", "min_p", "repetition_penalty", "repeat_penalty"})) as server:
        assert draw(server, tmp_path / "vllm")[1] == 24
        assert len(seen) == 6
    with Server(strict(set())) as server:
        with pytest.raises(
            EndpointError, match=r"unexpected \['min_p.*unexpected \['generation_config.*request_fields"
        ):
            draw(server, tmp_path / "openai", prompts=PROMPTS[:1])
        store = RolloutStore.open(tmp_path / "openai", KEY)
        assert sample_endpoint(endpoint(server), "toy", PROMPTS, 2, store=store, request_fields={}) == 12


@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("fastapi", "uvicorn", "openai")),
    reason="transformers serve needs fastapi, uvicorn and openai (pip install transformers[serving])",
)
def test_transformers_serve_samples_the_policy(tmp_path):
    """Left to itself it decodes greedily; told to sample, it would keep 50 of these 120 words."""
    count, vocabulary = 250, 120
    folder = random_llama(tmp_path / "model", vocabulary, spread=1.0, max_length=24, seed=5)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", "--host", "127.0.0.1"]
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen([*command, "--port", str(port)], stdout=log, stderr=log)
    text, chat = Prompt("a b c"), Prompt([{"role": "user", "content": "b b"}])
    key = RolloutKey("endpoint:toy", "none", max_new_tokens=1, seed=3, sampler="openai")
    store = RolloutStore.open(tmp_path / "store", key)
    patient = Endpoint(f"http://127.0.0.1:{port}/v1", retries=100, first_wait=0.2, timeout=60)
    try:
        for prompt, number in ((text, count), (chat, 8)):
            drawn = sample_endpoint(patient, str(folder), [prompt], number, store=store, concurrency=4)
            assert drawn == number
    finally:
        server.terminate()
        server.wait(20)
    assert len(set(store.lists_PK("text", [chat.id], 8)[0])) > 1  # equal by chance: under 1e-6
    said = np.array([tokenizer.convert_tokens_to_ids(word or EOS_TOKEN)
                     for word in store.lists_PK("text", [text.id], count)[0]])  # fmt: skip
    with torch.inference_mode():
        logits = model(**tokenizer(text.prompt, return_tensors="pt")).logits[0, -1].double()
    chance = torch.softmax(logits, -1).numpy()
    chance[1], chance[0] = chance[1] + chance[0], 0.0  # pad and end both say nothing
    order = np.argsort(-chance)
    groups = np.array_split(order[:-1], 12)
    observed = [np.isin(said, group).sum() for group in groups]
    expected = [count * chance[group].sum() for group in groups]
    assert stats.chisquare(observed, expected).pvalue > 1e-4  # the false-alarm rate
    assert chance[order[50:]].sum() > 0.15, "top-k 50 would hardly show"
