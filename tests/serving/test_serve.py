"""`infalign serve` as its users meet it: a process, a socket, the real OpenAI client."""

import asyncio
import importlib
import json
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import openai
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import infalign as ia
from infalign.calibration.calibrator import RewardCalibrator
from infalign.errors import InputError
from infalign.rewards.source import FunctionReward
from infalign.select.decoder import Decoder
from infalign.select.local import LocalSampler
from tests.runs import infalign
from tests.serving.conftest import LENGTH, REWARDS, USER
from tests.serving.process import Served

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")


def vowels(prompts, completions):
    texts = [one if isinstance(one, str) else one[-1]["content"] for one in completions]
    return [float(sum(c in "aeiou" for c in text)) for text in texts]


def client_of(server, **settings):
    return openai.OpenAI(base_url=server.url + "/v1", **{"api_key": "none", "max_retries": 0, **settings})


def ask(server, content="Say 2", **fields):
    return server.post(
        "/v1/chat/completions", {"model": "policy", "messages": [{"role": "user", "content": content}], **fields}
    )


# --- what it answers --------------------------------------------------------------------------------------------------


def test_the_openai_client_works_unchanged_and_gets_best_of_n(served, folder):
    """The first answer of a seeded server is the one that the decoder itself gives."""
    answer = served.first
    model = AutoModelForCausalLM.from_pretrained(folder / "policy").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    sampler = LocalSampler(model, tokenizer, max_new_tokens=LENGTH)
    (expected,) = Decoder(sampler, FunctionReward(vowels), ia.BestOfN(4), seed=7).decode([[USER]], call=0)
    assert answer.choices[0].message.content == expected.chosen.text
    assert answer.choices[0].finish_reason == expected.chosen.finish_reason
    assert len(answer.choices) == 1
    assert answer.object == "chat.completion"
    assert answer.model == "policy"
    how = answer.model_extra["infalign"]
    assert (how["procedure"], how["num_candidates"]) == (expected.procedure.label, 4)
    assert how["reward"] == expected.chosen.reward == max(one.reward for one in expected.candidates)
    assert how["calibrated_reward"] is None
    assert how["answer_tokens"] == expected.chosen.num_tokens
    prompt_tokens = len("<|user|>Say 2<|assistant|>")
    assert answer.usage.prompt_tokens == prompt_tokens
    assert answer.usage.completion_tokens == expected.num_tokens == sum(c.num_tokens for c in expected.candidates)
    assert answer.usage.total_tokens == prompt_tokens + expected.num_tokens


def test_every_request_draws_afresh(served):
    texts = {ask(served)[2]["choices"][0]["message"]["content"] for _ in range(5)}
    assert len(texts) > 1


def test_text_completions_and_model_listing(served):
    with client_of(served) as client:
        answer = client.completions.create(model="policy", prompt="Once ", max_tokens=LENGTH)
        assert isinstance(answer.choices[0].text, str)
        assert answer.usage.prompt_tokens == 5
        assert [model.id for model in client.models.list()] == ["policy"]
        assert client.models.retrieve("policy").owned_by == "infalign"
        with pytest.raises(openai.NotFoundError, match="there is no model 'gpt'"):
            client.models.retrieve("gpt")


def test_an_answer_can_be_sent_back(served):
    with client_of(served) as client:
        first = client.chat.completions.create(model="policy", messages=[USER])
        parts = [{"type": "text", "text": "Say"}, {"type": "text", "text": "3"}]
        messages = [USER, first.choices[0].message, {"role": "user", "content": parts}]
        second = client.chat.completions.create(
            model="policy",
            messages=messages,
            n=1,
            stream=False,
            temperature=1.0,
            top_p=1,
            user="me",
            metadata={"a": "b"},
        )
    shown = f"<|user|>Say 2<|assistant|>{first.choices[0].message.content}<|user|>Say\n3<|assistant|>"
    assert second.usage.prompt_tokens == len(shown.encode())


def test_calibrated_rewards_for_the_prompts_of_a_run(run_folder, importable):
    """By hand, with the columns of the prompt's row; another prompt has no calibrated reward."""
    row = json.loads((run_folder / "prompts" / "train.jsonl").read_text().splitlines()[0])
    references = RewardCalibrator.load(run_folder / "calibration" / "calibrator").ref_rewards_PK[0]
    with Upstream(0.0) as upstream:
        arguments = ("--upstream", f"http://127.0.0.1:{upstream.port}/v1", "--model-name", "policy", "--n", 3)
        with Served("serve", *arguments, "--calibration", run_folder, "--trust-run", cwd=importable) as server:
            asked = [{"model": "policy", "prompt": prompt} for prompt in (row["prompt"], "something else")]
            with ThreadPoolExecutor(8) as pool:  # together, so that known and unknown prompts meet
                answers = list(pool.map(lambda one: server.post("/v1/completions", one)[2], asked * 4))
        for known, unknown in zip(answers[::2], answers[1::2], strict=True):
            text = known["choices"][0]["text"]
            raw = len(text) / 100 + len(row["row"]["note"])
            assert known["infalign"]["reward"] == pytest.approx(raw)
            expected = (references < raw - 1e-9).mean() + (np.abs(references - raw) < 1e-9).mean() / 2
            assert known["infalign"]["calibrated_reward"] == pytest.approx(expected)
            assert unknown["infalign"]["reward"] == pytest.approx(len(unknown["choices"][0]["text"]) / 100)
            assert unknown["infalign"]["calibrated_reward"] is None


# --- what it refuses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n": 2}, "n: the procedure draws several candidates and returns one of them; leave it out or give 1"),
        ({"n": 100_000}, "n: the procedure draws several candidates"),
        ({"n": True}, "n: the procedure draws"),
        ({"stream": True}, "stream: an answer is chosen among whole candidates, so it cannot be streamed"),
        ({"temperature": 0.2}, "temperature is 0.2, but candidates are drawn with 1"),
        ({"top_p": 0.9}, "top_p is 0.9, but candidates are drawn with 1"),
        ({"max_tokens": 3}, "at most 3 tokens are wanted, but candidates of up to 8 are compared"),
        ({"max_completion_tokens": 3, "max_tokens": 50}, "at most 3 tokens are wanted"),
        ({"seed": 1}, "seed: every request draws afresh"),
        ({"stop": ["x"]}, "stop: candidates end where the model ends them"),
        ({"frequency_penalty": 0.5}, "frequency_penalty: candidates are drawn from the model as it is"),
        ({"logprobs": True}, "logprobs: the log-probabilities of a chosen candidate are not those of the answer"),
        ({"tools": [{"type": "function"}]}, "tools: tools are not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format: only plain text is supported"),
        ({"top_k": 5}, "top_k: this field is not known; leave it out"),
        ({"temperature": "1"}, "temperature: this must be a number"),
        ({"max_tokens": 0}, "max_tokens: this must be at least 1"),
        ({"messages": []}, "messages: there must be at least 1 entry"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role: this must be 'system', 'developer'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "content.0.type: this must be 'text'"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content: this must be text or a list"),
        ({"messages": [{"role": "user"}]}, "messages.0.content: this field is required"),
        ({"messages": "Say 2"}, "messages: this must be a list"),
        ({"messages": ["Say 2"]}, "messages.0: this must be an object"),
        ({"model": None}, "model: this must be text"),
        ({"temperature": 3}, "temperature: this must be at most 2"),
        ({"top_p": 0}, "top_p: this must be more than 0"),
        ({"max_tokens": 20.5}, "max_tokens: this must be a whole number"),
        ({"max_tokens": 1 << 40}, "max_tokens: this must be at most 2,147,483,648"),
        ({"parallel_tool_calls": "yes"}, "parallel_tool_calls: this must be true or false"),
        ({"metadata": []}, "metadata: this must be an object"),
        ({"messages": [{"role": "user", "content": "  "}]}, "the prompt is empty"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "half of a surrogate pair"),
        ({"messages": [{"role": "user", "content": "x" * 200}]}, "leave"),
        (
            {"messages": [{"role": "user", "content": "provoke"}]},
            "chat template refuses these messages (no provocation)",
        ),
    ],
)
def test_bad_requests_say_what_is_wrong(served, fields, message):
    status, _, answer = ask(served, **fields)
    assert status == 400
    assert message in answer["error"]["message"]
    assert "nput should" not in answer["error"]["message"]
    assert answer["error"]["type"] == "invalid_request_error"


def test_other_names_paths_and_bodies(served):
    status, _, answer = served.post("/v1/chat/completions", {"model": "gpt", "messages": [USER]})
    assert status == 404
    assert "there is 'policy'" in answer["error"]["message"]
    for body in (b"", b"{", b"[" * 10_000, b"\xff\xfe", b'"text"', b"null", b'{"model": NaN}'):
        assert served.post("/v1/chat/completions", body)[0] == 400
    for body in (b"", b'"text"', b"null", b"[]"):
        assert served.post("/v1/chat/completions", body)[2]["error"]["message"] == "the request must be a JSON object"
    assert served.get("/v1/nothing")[0] == 404
    assert served.get("/v1/completions")[0] == 405
    status, _, answer = served.post("/v1/chat/completions", b" " * ((4 << 20) + 1))
    assert status == 413
    assert "larger than 4,194,304 bytes" in answer["error"]["message"]
    assert served.get("/health")[2]["status"] == "ok"


def test_a_body_without_end_is_not_read_to_its_end(served):
    """Chunked, so its length is not announced."""
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=30)
    chunks = (b" " * (1 << 20) for _ in range(8))
    connection.request(
        "POST", "/v1/completions", body=chunks, headers={"Content-Type": "application/json"}, encode_chunked=True
    )
    assert connection.getresponse().status == 413
    connection.close()


def test_the_key_is_asked_for_and_never_shown(folder):
    key = "sesame-open-1"
    more = ("--api-key-variable", "SERVE_TEST_KEY")
    with Upstream(0.0) as upstream, serve_in_front(folder, upstream, *more, env={"SERVE_TEST_KEY": key}) as server:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": key}):
            status, given, answer = server.post("/v1/chat/completions", b"not even JSON", headers)
            assert status == 401
            assert given["www-authenticate"] == "Bearer"
            assert answer["error"]["type"] == "authentication_error"
        assert server.get("/v1/models")[0] == 401
        assert server.get("/health")[0] == 200
        with client_of(server, api_key=key) as client:
            assert client.chat.completions.create(model="policy", messages=[USER]).choices
        with client_of(server, api_key="other") as client, pytest.raises(openai.AuthenticationError):
            client.models.list()
        assert server.stop() == 0
        assert key not in "".join(server.lines)


def test_what_cannot_be_served_is_said_at_once(folder, run_folder, monkeypatch, capfd):
    monkeypatch.chdir(folder)
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    model = ["--model", "policy"]
    (folder / "other_rewards.py").write_text(REWARDS)
    calibrated = [*model, "--n", "4", "--calibration", str(run_folder), "--reward"]
    for arguments, message in [
        ([], "Give either --model, or --upstream"),
        ([*model, "--upstream", "http://127.0.0.1:9/v1", "--model-name", "m"], "Give either --model, or --upstream"),
        (["--upstream", "http://127.0.0.1:9/v1"], "a model upstream has a name there"),
        ([*model, "--n", "4"], "needs a reward to rank candidates by"),
        ([*model, "--n", "4", "--reward", "serve_rewards:graded"], "cannot be called"),
        ([*model, "--n", "4", "--reward", "./nowhere"], "there is no such folder"),
        ([*model, "--n", "4", "--api-key-variable", "NO_SUCH_KEY"], "NO_SUCH_KEY is not set"),
        ([*calibrated, "other_rewards:vowels"], "the calibration was made with served_rewards:vowels"),
        ([*calibrated[:-1], "--procedure", "worst-of-4"], "--n and --k do not go with 'worst-of-4'"),
        (["--model", "./nowhere", "--n", "4", "--reward", "serve_rewards:vowels"], "./nowhere"),
        ([*model, "--n", "4", "--concurrency", "2"], "--concurrency does nothing without --upstream"),
        (
            ["--upstream", "http://127.0.0.1:9/v1", "--model-name", "m", "--batch-size", "2"],
            "--batch-size does nothing with --upstream",
        ),
    ]:
        code, _, told = infalign(capfd, monkeypatch, "serve", *arguments, "--port", "0")
        assert (code, message in told) == (2, True), told


# --- how it bears up --------------------------------------------------------------------------------------------------


async def crowd(server, watch, clients=64):
    """Clients that each ask one request after the other until `watch(counts)` ends; how many got what."""
    got, watching = {}, None

    async def one(client):
        while not watching.done():
            try:
                await client.chat.completions.create(model="policy", messages=[USER])
                outcome = 200
            except openai.APIStatusError as error:
                outcome = (error.status_code, int(error.response.headers["Retry-After"]) >= 1)
                await asyncio.sleep(0.1)
            got[outcome] = got.get(outcome, 0) + 1

    async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=60) as client:
        watching = asyncio.ensure_future(watch(got))
        await asyncio.gather(watching, *(one(client) for _ in range(clients)))
    return got


async def until(condition, seconds=60.0):  # far more than it takes: the machine may be busy
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        await asyncio.sleep(0.02)


TOLD_TO_WAIT = (429, True)
TOLD_OF_TROUBLE = (503, True)


def test_sixty_four_clients_each_get_an_answer_or_are_told_to_wait(served):
    async def watch(got):
        await until(lambda: got.get(200, 0) >= 96 and got.get(TOLD_TO_WAIT, 0) >= 10)

    got = asyncio.run(crowd(served, watch))
    assert set(got) == {200, TOLD_TO_WAIT}
    health = served.get("/health")[2]
    assert (health["open"], health["waiting"], health["capacity"]) == (0, 0, 48)


class Upstream:
    """The server behind ours, in a process that can be killed."""

    def __init__(self, seconds, port=0):
        script = Path(__file__).with_name("upstream.py")
        self._process = subprocess.Popen(
            [sys.executable, str(script), str(port), str(seconds)], stdout=subprocess.PIPE, text=True
        )
        self.port = int(self._process.stdout.readline().split()[1])

    def kill(self):
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.kill()


def serve_in_front(folder, upstream, *more, **settings):
    address = f"http://127.0.0.1:{upstream.port}/v1"
    model = ("--upstream", address, "--model-name", "policy", "--reward", "serve_rewards:numbers", "--n", 4)
    return Served("serve", *model, *more, cwd=folder, **settings)


def test_an_upstream_that_dies_and_comes_back(folder):
    with Upstream(0.02) as first, serve_in_front(folder, first) as server:
        status, _, answer = ask(server)
        assert status == 200
        assert answer["infalign"]["reward"] == float(answer["choices"][0]["message"]["content"])
        assert answer["infalign"]["num_tokens"] == 12
        assert answer["usage"] is None  # nobody has counted the prompt's tokens
        status, _, answer = ask(server, "refuse me")
        assert status == 400
        assert "not this one" in answer["error"]["message"]
        status, headers, answer = ask(server, "unscorable")
        assert (status, answer["error"]["type"], headers["retry-after"]) == (503, "reward_error", "5")
        first.kill()
        status, headers, answer = ask(server)
        assert (status, answer["error"]["type"], headers["retry-after"]) == (503, "upstream_error", "5")
        assert "the upstream server does not answer" in answer["error"]["message"]
        assert str(first.port) not in answer["error"]["message"]  # where it is is nobody's business
        assert server.get("/health")[2]["status"] == "upstream does not answer"
        with Upstream(0.02, first.port), client_of(server, max_retries=2) as client:
            assert client.chat.completions.create(model="policy", messages=[USER]).choices
            assert server.get("/health")[2]["status"] == "ok"


def test_a_crowd_while_the_upstream_dies_and_comes_back(folder):
    with Upstream(0.02) as first, serve_in_front(folder, first) as server:
        second = []

        async def watch(got):
            await until(lambda: got.get(200, 0) >= 100)
            first.kill()
            await until(lambda: got.get(TOLD_OF_TROUBLE, 0) >= 20)
            second.append(await asyncio.to_thread(Upstream, 0.02, first.port))
            answered = got[200]
            await until(lambda: got[200] >= answered + 100)

        try:
            got = asyncio.run(crowd(server, watch))
            assert set(got) == {200, TOLD_OF_TROUBLE}
            assert ask(server)[0] == 200
        finally:
            for upstream in second:
                upstream.kill()


def test_requests_that_take_too_long(folder):
    with Upstream(3.0) as slow, serve_in_front(folder, slow, "--timeout", 0.5, "--concurrency", 1) as server:
        began = time.monotonic()
        status, headers, answer = ask(server)
        assert (status, headers["retry-after"]) == (503, "5")
        assert answer["error"]["type"] in ("timeout", "upstream_error")
        assert time.monotonic() - began < 2.5


def test_told_to_stop_it_finishes_what_runs_and_takes_in_nothing_more(folder):
    with Upstream(1.5) as upstream, serve_in_front(folder, upstream) as server:
        answers = []
        asking = [threading.Thread(target=lambda: answers.append(ask(server)[0])) for _ in range(4)]
        for thread in asking:
            thread.start()
        end = time.monotonic() + 20
        while server.get("/health")[2]["open"] < 4:
            assert time.monotonic() < end
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.4)
        with pytest.raises(OSError, match="refused"):
            ask(server)
        for thread in asking:
            thread.join()
        assert answers == [200] * 4
        assert server.process.wait(20) == 0


def test_clients_that_leave_make_room(folder):
    """Their requests wait for nothing any more; those that were begun keep their place until they end."""
    import http.client

    with Upstream(2.0) as upstream, serve_in_front(folder, upstream, "--concurrency", 1, "--queue", 8) as server:
        body = json.dumps({"model": "policy", "messages": [USER]})
        connections = [http.client.HTTPConnection("127.0.0.1", server.port) for _ in range(8)]
        for connection in connections:
            connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        end = time.monotonic() + 20
        while server.get("/health")[2]["open"] < 8:
            assert time.monotonic() < end
        assert ask(server)[0] == 429
        for connection in connections:
            connection.close()
        while server.get("/health")[2]["open"] > 1:
            assert time.monotonic() < end


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    monkeypatch.delitem(sys.modules, "infalign.select.serving.web", raising=False)
    with pytest.raises(InputError, match=r"serving needs FastAPI.*pip install 'infalign\[serve\]'"):
        importlib.import_module("infalign.select.serving.web")
