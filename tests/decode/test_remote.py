"""Procedures in front of an OpenAI-compatible server, over real sockets."""

from __future__ import annotations

import json
import subprocess
import sys
import threading

import numpy as np
import pytest
from scipy import stats

import infalign as ia
from infalign._io.http import Endpoint, EndpointError
from infalign.errors import InputError
from infalign.rewards.source import FunctionReward, HTTPReward
from infalign.rollouts.prompts import Prompt
from infalign.select.decoder import Decoder
from infalign.select.remote import EndpointSampler
from tests.rollouts.test_endpoint import Server

FALSE_ALARM = 1e-4


def numbers(number, path, content, headers):
    """Every response is a uniform number, decided by the seed that the request carries."""
    rng = np.random.default_rng(content["seed"])
    said = [f"{value:.9f}" for value in rng.random(content["n"])]
    made = [{"text": text} if "prompt" in content else {"message": {"role": "assistant", "content": text}}
            for text in said]  # fmt: skip
    for one in made:
        one["finish_reason"] = "stop"
    return 200, {}, json.dumps({"choices": made, "usage": {"completion_tokens": 5 * len(made)}}).encode()


def number_said(prompts, completions):
    return [float(one if isinstance(one, str) else one[0]["content"]) for one in completions]


def sampler(server, **settings):
    endpoint = Endpoint(server.url, timeout=5.0, retries=1, first_wait=0.01)
    return EndpointSampler(endpoint, "toy", **{"max_new_tokens": 8, **settings})


@pytest.mark.parametrize("procedure", [ia.BestOfN(4), ia.WorstOfN(16)], ids=lambda procedure: procedure.label)
def test_what_comes_out_has_the_cdf_of_the_theory(procedure):
    with Server(numbers) as server:
        decoder = Decoder(sampler(server), FunctionReward(number_said, key="said"), procedure, seed=3)
        answers = decoder.decode([f"prompt {i}" for i in range(150)] + [[{"role": "user", "content": "Hi"}]] * 150)
        assert server.count == 300, "all candidates of a prompt in one request"
    uniform = procedure.distortion([answer.chosen.reward for answer in answers])
    assert stats.kstest(uniform, "uniform").pvalue > FALSE_ALARM
    assert all(answer.num_tokens == 5 * procedure.n for answer in answers), "as the server counts them"
    assert all(one.num_tokens is None for one in answers[0].candidates)


def test_the_reward_may_be_a_server_too():
    def both(number, path, content, headers):
        if "completions" in content:
            return 200, {}, json.dumps({"rewards": number_said([], content["completions"])}).encode()
        return numbers(number, path, content, headers)

    with Server(both) as server:
        reward = HTTPReward(Endpoint(server.url), name="said")
        (answer,) = Decoder(sampler(server), reward, ia.BestOfN(3)).decode(["a"])
        assert answer.chosen.reward == max(float(one.text) for one in answer.candidates)


def test_a_prompt_that_the_server_fails_on_fails_alone():
    broken = threading.Event()

    def fails_for_b(number, path, content, headers):
        if content.get("prompt") == "b" and not broken.is_set():
            return 500, {}, b"out of memory"
        return numbers(number, path, content, headers)

    with Server(fails_for_b) as server:
        decoder = Decoder(sampler(server), FunctionReward(number_said, key="said"), ia.BestOfN(2))
        good, bad, also = decoder.decode_each(["a", "b", "c"])
        assert good.chosen.text
        assert also.chosen.text
        assert isinstance(bad, EndpointError)
        assert "out of memory" in str(bad)
        broken.set()
        assert decoder.decode(["b"])[0].chosen.text


def test_tokens_are_counted_here_if_asked_to():
    with Server(numbers) as server:
        counting = sampler(server, count_tokens=len)
        (answer,) = Decoder(counting, FunctionReward(number_said, key="said"), ia.BestOfN(2)).decode(["a"])
        assert [one.num_tokens for one in answer.candidates] == [12, 12]  # 11 characters and the end
        assert answer.num_tokens == 24
    with Server(lambda *request: (200, {}, b'{"choices": [{"text": "0.5", "finish_reason": "stop"}]}')) as server:
        (answer,) = Decoder(sampler(server), FunctionReward(number_said, key="said"), ia.BestOfN(2)).decode(["a"])
        assert answer.num_tokens is None


def test_settings_are_checked_at_once():
    for settings in ({"max_new_tokens": 0}, {"temperature": 0.0}, {"top_p": 1.5}, {"concurrency": 0}):
        with pytest.raises(InputError):
            EndpointSampler(Endpoint("http://127.0.0.1:9/v1"), "toy", **{"max_new_tokens": 8, **settings})


def test_a_prompt_object_keeps_its_columns_for_the_reward():
    def graded(prompts, completions, answer):
        return [len(text) * weight for text, weight in zip(completions, answer, strict=True)]

    with Server(numbers) as server:
        decoder = Decoder(sampler(server), FunctionReward(graded, key="graded"), ia.BestOfN(2))
        answers = decoder.decode([Prompt("a", {"answer": 2}), Prompt("b", {"answer": 3})])
    assert [answer.chosen.reward for answer in answers] == [22.0, 33.0]


def test_no_torch_is_needed_in_front_of_a_server():
    code = (
        "import sys, infalign as ia\n"
        "from infalign._io.http import Endpoint\n"
        "sampler = ia.EndpointSampler(Endpoint('http://127.0.0.1:9/v1'), 'm', max_new_tokens=4)\n"
        "ia.Decoder(sampler, None, ia.Standard())\n"
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"
