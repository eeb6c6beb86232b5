"""How near the online solver ends to p·exp(Φ/β)/Z, for every transform and KL, on a policy small enough to enumerate.

    python benchmarks/exactness.py        # about 20 s a case; --steps, --rollouts, --learning-rate change it

Total variation to the optimum (with K = 256 references, whose own tilt M6 is the target; the floor under the tilt that
training has is not in it), the worse of two prompts.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.training.enumerable import PROMPTS, TOKENS, Testbed

from infalign.errors import InputError
from infalign.procedures import BestOfN, WorstOfN
from infalign.run.testbed.quiet import quiet
from infalign.theory.alternatives import tilt_at_kl
from infalign.theory.plan import optimum_at_kl
from infalign.training.online import ANNEAL, align
from infalign.transforms import Exponential, Identity


def main() -> None:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rollouts", type=int, default=512, help="per step, over two prompts")
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--anneal", type=float, default=ANNEAL, help="share of the steps over which the tilt comes in")
    parser.add_argument("--kls", type=float, nargs="+", default=[0.1, 0.5, 2.0])
    names = ["identity", "exponential+10", "exponential-10", "best-of-4", "worst-of-4"]
    parser.add_argument("--transforms", nargs="+", default=names, choices=names)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(f"{'transform':20s}{'planned KL':>11s}{'beta':>9s}{'KL of optimum':>15s}{'KL reached':>12s}"
          f"{'TV at start':>13s}{'TV':>8s}", flush=True)  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch, quiet():
        testbed = Testbed(Path(scratch) / "reference", vocabulary=6)
        for name in options.transforms:
            for kl in options.kls:
                procedure = {"best-of-4": BestOfN(4), "worst-of-4": WorstOfN(4)}.get(name)
                try:
                    if procedure is not None:
                        optimum = optimum_at_kl(procedure, kl)
                        transform, beta = optimum.transform, optimum.beta
                    else:
                        transform = Identity() if name == "identity" else Exponential(float(name[11:]))
                        beta = tilt_at_kl(transform, kl).beta
                except InputError as error:
                    print(f"{name:20s}{kl:11.1f}  not reachable ({error.what})", flush=True)
                    continue
                reward = testbed.reward(transform, beta)
                start = max(testbed.distance(testbed.reference, reward))
                result = align(
                    testbed.reference, Path(scratch) / f"{name}-{kl}", PROMPTS, reward, max_new_tokens=TOKENS,
                    steps=options.steps, prompts_per_step=2, num_generations=options.rollouts // 2,
                    learning_rate=options.learning_rate, anneal=options.anneal, save_steps=10**6,
                )  # fmt: skip
                exact = sum(testbed.optimum(reward, index)[1] for index in range(len(PROMPTS))) / len(PROMPTS)
                print(f"{name:20s}{kl:11.1f}{beta:9.4f}{exact:15.3f}{testbed.kl(result.model):12.3f}"
                      f"{start:13.3f}{max(testbed.distance(result.model, reward)):8.4f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
