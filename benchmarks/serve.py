"""Load on `infalign serve`: 64 clients for a minute, on a tiny local model and on an upstream that dies and comes back.

Run `python benchmarks/serve.py [--seconds 60] [--clients 64]`. Prints, as Markdown rows, how many requests were
answered, refused with 429 and refused with 503, whether each refusal came with Retry-After, and the latency of answers.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import openai

from infalign.run.testbed.toy import random_llama

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from tests.serving.process import Served  # noqa: E402

TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}<|assistant|>"
REWARDS = """
def vowels(prompts, completions):
    return [float(sum(c in "aeiou" for c in text)) for text in completions]

def numbers(prompts, completions):
    return [float(text) for text in completions]
"""


async def crowd(url: str, clients: int, seconds: float) -> tuple[Counter[str], np.ndarray, float]:
    """Ask without a pause; after a refusal wait as long as it says."""
    outcomes: Counter[str] = Counter()
    waits: list[float] = []
    settings = {"base_url": url + "/v1", "api_key": "none", "max_retries": 0, "timeout": 120}
    async with openai.AsyncOpenAI(**settings) as client:
        started = time.monotonic()
        end = started + seconds

        async def one() -> None:
            while (began := time.monotonic()) < end:
                try:
                    await client.chat.completions.create(model="policy", messages=[{"role": "user", "content": "Say"}])
                except openai.APIStatusError as error:
                    told = error.response.headers.get("Retry-After")
                    outcomes[f"{error.status_code}" if told else f"{error.status_code} without Retry-After"] += 1
                    await asyncio.sleep(min(float(told or 1), max(0.0, end - time.monotonic())))
                except openai.APIError as error:
                    outcomes[type(error).__name__] += 1
                else:
                    outcomes["200"] += 1
                    waits.append(time.monotonic() - began)

        await asyncio.gather(*(one() for _ in range(clients)))
    return outcomes, np.array(waits), time.monotonic() - started


def start_upstream(port: int) -> tuple[subprocess.Popen[str], int]:
    """The server behind ours, and its port."""
    script = ROOT / "tests" / "serving" / "upstream.py"
    process = subprocess.Popen([sys.executable, str(script), str(port), "0.2"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, int(process.stdout.readline().split()[1])


def show(title: str, outcomes: Counter[str], waits: np.ndarray, seconds: float) -> None:
    """One row of the table."""
    answered, refused = outcomes.pop("200", 0), {key: outcomes.pop(key, 0) for key in ("429", "503")}
    median, high, most = np.quantile(waits, [0.5, 0.95, 1.0]) if len(waits) else (np.nan,) * 3
    others = ", ".join(f"{count} × {name}" for name, count in outcomes.items()) or "none"
    cells = [title, answered, f"{answered / seconds:.1f}", *refused.values(), others]
    print("| " + " | ".join(map(str, [*cells, f"{median:.2f}", f"{high:.2f}", f"{most:.2f}"])) + " |", flush=True)


async def with_trouble(url: str, clients: int, seconds: float, first: subprocess.Popen[str], port: int):
    """The crowd, while the upstream is dead from a third to half of the time."""

    async def trouble() -> subprocess.Popen[str]:
        await asyncio.sleep(seconds / 3)
        first.kill()
        await asyncio.sleep(seconds / 6)
        return (await asyncio.to_thread(start_upstream, port))[0]

    outcome, second = await asyncio.gather(crowd(url, clients, seconds), trouble())
    second.kill()
    return outcome


def main() -> None:
    """Four rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--only", default="", help="The rows with this in their title.")
    given = parser.parse_args()
    print("| | answered | per second | 429 | 503 | others | median s | 95 % s | most s |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        random_llama(folder / "policy", hidden_size=64, num_layers=2, num_heads=4, max_length=128, seed=1)
        (folder / "policy" / "chat_template.jinja").write_text(TEMPLATE)
        (folder / "load_rewards.py").write_text(REWARDS)
        local = ("serve", "--model", folder / "policy", "--reward", "load_rewards:vowels", "--n", 4)
        for title, more in (
            ("local, room for all", ("--queue", 128)),
            ("local, room for 32", ("--queue", 32)),
            ("local, one request at a time", ("--queue", 128, "--batch-size", 1)),
        ):
            if given.only not in title:
                continue
            with Served(*local, "--max-new-tokens", 32, *more, cwd=folder) as server:
                show(title, *asyncio.run(crowd(server.url, given.clients, given.seconds)))
                assert server.stop() == 0
        title = "upstream killed and restarted"
        if given.only not in title:
            return
        upstream, port = start_upstream(0)
        address = ("--upstream", f"http://127.0.0.1:{port}/v1", "--model-name", "policy")
        more = ("--reward", "load_rewards:numbers", "--n", 4, "--concurrency", 32)
        with Served("serve", *address, *more, cwd=folder) as server:
            outcome = asyncio.run(with_trouble(server.url, given.clients, given.seconds, upstream, port))
            show(title, *outcome)
            assert server.stop() == 0


if __name__ == "__main__":
    main()
