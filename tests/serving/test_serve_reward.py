"""`infalign serve-reward` as OpenRLHF meets it: a process, a socket, decoded tokens."""

import json
import signal
import socket
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from transformers import AutoTokenizer

from infalign.integrations.trl import TrainerReward
from tests.runs import infalign
from tests.serving.process import Served

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
RESPONSES = ["aeiou", " bcd", "oo\nüß oo", ""]


@pytest.fixture(scope="module")
def served(run_folder, importable):
    with Served("serve-reward", run_folder, "--trust-run", cwd=importable) as server:
        yield server


def prompts_of(run_folder):
    return [json.loads(line) for line in (run_folder / "prompts" / "train.jsonl").read_text().splitlines()]


def asked(run_folder, shown, responses):
    """What OpenRLHF's single-turn executor posts: all tokens, prompt and response, decoded with the special ones."""
    tokenizer = AutoTokenizer.from_pretrained(run_folder.parent / "policy")
    queries = []
    for prompt, response in zip(shown, responses, strict=True):
        tokens = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        tokens += tokenizer(response, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        queries.append(tokenizer.decode(tokens, skip_special_tokens=False))
    assert all(query.endswith("<|end|>") for query in queries)
    return {"query": queries, "prompts": shown, "labels": [None] * len(shown)}


def test_a_batch_gets_what_the_run_was_planned_with(served, run_folder):
    rows = prompts_of(run_folder)[:4]
    status, _, answer = served.post("/get_reward", asked(run_folder, [row["prompt"] for row in rows], RESPONSES))
    assert status == 200
    worth = TrainerReward(run_folder)([row["id"] for row in rows], RESPONSES)
    assert answer["rewards"] == pytest.approx(worth.nats_B)
    assert answer["scores"] == pytest.approx(worth.calibrated_B)
    assert all(0 <= score <= 1 for score in answer["scores"])
    assert answer["extra_logs"]["calibrated_reward"] == answer["scores"]
    assert answer["extra_logs"]["raw_reward"] == pytest.approx(worth.rewards_B)
    assert len(set(answer["rewards"])) > 1


def test_many_single_requests_at_once(served, run_folder):
    """OpenRLHF 0.11 sends one response per request, as many at a time as there are rollouts under way."""
    rows = prompts_of(run_folder)
    wanted = [(rows[i % len(rows)], RESPONSES[i % 3] * (1 + i % 5)) for i in range(200)]
    worth = TrainerReward(run_folder)([row["id"] for row, _ in wanted], [text for _, text in wanted])

    def ask(row, text):
        status, _, answer = served.post("/get_reward", asked(run_folder, [row["prompt"]], [text]))
        assert status == 200
        return answer["rewards"]

    bodies = [asked(run_folder, [row["prompt"]], [text]) for row, text in wanted]
    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(lambda body: served.post("/get_reward", body), bodies))
    assert [status for status, _, _ in answers] == [200] * 200
    assert np.concatenate([answer["rewards"] for _, _, answer in answers]) == pytest.approx(worth.nats_B)


def test_messages_are_known_by_the_policys_own_template_and_it_stops_when_told(chat_run_folder, importable):
    rows = prompts_of(chat_run_folder)[:2]
    shown = [f"<|user|>{row['prompt'][0]['content']}<|assistant|>" for row in rows]
    with Served(
        "serve-reward", chat_run_folder, "--trust-run", "--policy", "identity", "--beta", "0.7", cwd=importable
    ) as server:
        status, _, answer = server.post("/get_reward", asked(chat_run_folder, shown, RESPONSES[:2]))
        assert status == 200
        worth = TrainerReward(chat_run_folder, "identity", beta=0.7)([row["id"] for row in rows], RESPONSES[:2])
        assert answer["rewards"] == pytest.approx(worth.nats_B)
        # The bare text is another prompt to this policy than the one it was calibrated on.
        plain = rows[0]["prompt"][0]["content"]
        status, _, answer = server.post("/get_reward", asked(chat_run_folder, [plain], ["x"]))
        assert status == 400
        assert "chat template" in answer["error"]["message"]
        with socket.socket() as other:
            other.connect(("127.0.0.1", server.port))  # a connection that asks nothing must not keep it
            assert server.stop(signal.SIGTERM, timeout=20) == 0
        assert "Stopped." in server.lines[-1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"query": ["Say 99: x"], "prompts": ["Say 99: "]}, "not among the run's 6 training prompts: 'Say 99: '"),
        ({"query": ["a", "b"], "prompts": ["a"]}, "2 queries and 1 prompt"),
        ({"query": [], "prompts": []}, "query: there must be at least 1 entry"),
        ({"query": ["a"] * 5000, "prompts": ["a"] * 5000}, "query: there must be at most 4,096 entries"),
        ({"query": [1], "prompts": ["a"]}, "query.0: this must be text"),
        ({"query": ["a"]}, "prompts: this field is required"),
        ([], "the request must be a JSON object"),
        (b"{", "not valid JSON"),
        (b"\xff", "error parsing the body"),
    ],
)
def test_requests_that_cannot_be_answered(served, content, message):
    status, _, answer = served.post("/get_reward", content)
    assert status == 400
    assert message in answer["error"]["message"]


def test_a_query_begins_with_its_prompt(served, run_folder):
    prompt = prompts_of(run_folder)[0]["prompt"]
    status, _, answer = served.post("/get_reward", {"query": [prompt[1:] + "x"], "prompts": [prompt]})
    assert status == 400
    assert "does not begin with its prompt" in answer["error"]["message"]


def test_it_reads_no_more_than_it_must(served):
    status, _, answer = served.post("/get_reward", b"x" * ((64 << 20) + 1))
    assert status == 413
    assert "larger than 67,108,864 bytes" in answer["error"]["message"]


def test_health_and_other_paths(served):
    status, _, answer = served.get("/health")
    assert (status, answer["status"], answer["open"]) == (200, "ok", 0)
    assert served.get("/nothing")[0] == 404
    assert served.get("/get_reward")[0] == 405


def test_what_cannot_be_served_is_said_at_once(run_folder, tmp_path, capfd, monkeypatch):
    for arguments, message in [
        ([str(tmp_path)], "is not a run folder"),
        ([str(run_folder), "--policy", "optimal"], "There are: exponential+10"),
    ]:
        code, _, err = infalign(capfd, monkeypatch, "serve-reward", *arguments, "--trust-run")
        assert code == 2
        assert message in err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, err = infalign(capfd, monkeypatch, "serve-reward", run_folder, "--trust-run", "--port", port)
        assert code == 2
        assert "Choose another --host or --port" in err
