"""A run's reward out of its folder, and behind verl's signature."""

import json
import pickle
import threading

import numpy as np
import pytest

import infalign as ia
from infalign.calibration.calibrator import RewardCalibrator
from infalign.errors import InputError, MismatchError, RewardError, StorageError
from infalign.integrations.trl import TrainerReward, load_transformed_reward
from infalign.integrations.verl import make_batch_compute_score, make_compute_score
from infalign.theory.finite_k import rank_conditional_tilt
from infalign.training.self_consistent import SelfConsistentTransform

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
TEXTS = ["aeiou", "bcd", "oooooooo", ""]


@pytest.fixture(scope="module")
def rows(run_folder):
    lines = (run_folder / "prompts" / "train.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def by_hand(run_folder, row, number, text):
    """Rank among the stored references, counted one by one, and the exponential transform's M6 at β = 0.5."""
    calibrator = RewardCalibrator.load(run_folder / "calibration" / "calibrator")
    references = np.asarray(calibrator.ref_rewards_PK[number])
    raw = sum(c in "aeiou" for c in text) + len(text) / 100 + len(row["row"]["note"])
    below, equal = int((references < raw).sum()), int((references == raw).sum())
    table = np.exp(rank_conditional_tilt(ia.Exponential(10.0), 0.5, len(references)) / 0.5)
    nats = np.log((table[below] + table[below + equal]) / 2) if equal <= 1 else None
    return raw, (below + equal / 2) / len(references), nats


def test_the_reward_of_a_run_by_hand(run_folder, rows):
    reward = ia.load_transformed_reward(run_folder)
    assert reward.transform.t == 10
    assert reward.beta == pytest.approx(0.5)
    for number, row in enumerate(rows):
        for text in TEXTS:
            _, calibrated, nats = by_hand(run_folder, row, number, text)
            if nats is not None:  # several equal references are M6's own business
                assert reward([row["prompt"]], [text], prompt_id=[row["id"]]) == pytest.approx([nats])
            raw = reward.score([row["prompt"]], [text], [row["id"]])
            assert reward.calibrate(raw, [row["id"]]) == pytest.approx([calibrated])


def test_other_transforms_and_another_beta(run_folder, rows):
    ids, texts = [rows[0]["id"]] * len(TEXTS), TEXTS
    identity = load_transformed_reward(run_folder, "identity")
    assert isinstance(identity.transform, ia.Identity)
    doubled = load_transformed_reward(run_folder, "identity", beta=2 * identity.beta)
    assert doubled.beta == 2 * identity.beta
    assert np.ptp(doubled(texts, texts, prompt_id=ids)) < np.ptp(identity(texts, texts, prompt_id=ids))


def test_a_self_consistent_transform_keeps_the_pace_of_training(run_folder, rows):
    """Eight responses make a step in this recipe, handed over together or one by one."""
    together = load_transformed_reward(run_folder, "self-consistent")
    singly = load_transformed_reward(run_folder, "self-consistent")
    assert isinstance(together.transform, SelfConsistentTransform)
    assert isinstance(singly.transform, SelfConsistentTransform)
    ids, texts = [rows[0]["id"]] * 8, ["aeiou"] * 8
    together(texts, texts, prompt_id=ids)
    for prompt_id, text in zip(ids, texts, strict=True):
        singly([text], [text], prompt_id=[prompt_id])
    assert together.transform.cdf == pytest.approx(singly.transform.cdf)
    moved = np.abs(together.transform.cdf - together.transform.edges).max()
    assert moved == pytest.approx(0.1 * 8 / 9, abs=1e-3)  # a tenth of the way to all mass in the top ninth


@pytest.mark.parametrize(
    ("ask", "error", "message"),
    [
        (lambda run: load_transformed_reward(run, "optimal"), InputError, "There are: exponential\\+10, identity"),
        (lambda run: load_transformed_reward(run, beta=0.0), InputError, "beta must be a positive number"),
        (lambda run: load_transformed_reward(run / "rollouts"), StorageError, "not a run folder"),
        (
            lambda run: TrainerReward(run)(["feed"], ["x"]),
            InputError,
            "'feed' is not among the run's 6 training prompts",
        ),
        (lambda run: make_compute_score(run, "optimal"), InputError, "no transform 'optimal'"),
    ],
)
def test_what_is_not_there(run_folder, ask, error, message):
    with pytest.raises(error, match=message):
        ask(run_folder)


def test_a_reward_that_changed_since_is_refused(tmp_path, importable, run_folder):
    import shutil

    shutil.copytree(run_folder, tmp_path / "run")
    path = tmp_path / "run" / "recipe.json"
    path.write_text(path.read_text().replace("served_rewards:vowels", "json:dumps"))
    with pytest.raises(MismatchError, match=r"reward is now json:dumps.*calibration was made with served_rewards"):
        load_transformed_reward(tmp_path / "run")


def test_verl_calls_it_by_name(run_folder, rows):
    """As verl's naive reward managers do: keywords, further entries in extra_info, further arguments."""
    compute_score = make_compute_score(run_folder)
    for number, row in enumerate(rows[:2]):
        for text in TEXTS:
            extra_info = {"prompt_id": row["id"], "index": number, "num_turns": None, "rollout_reward_scores": {}}
            got = compute_score(
                data_source="mine",
                solution_str=text,
                ground_truth=None,
                extra_info=extra_info,
                reward_router_address="x",
            )
            raw, calibrated, nats = by_hand(run_folder, row, number, text)
            assert got["raw_reward"] == pytest.approx(raw)
            assert got["calibrated_reward"] == pytest.approx(calibrated)
            assert nats is None or got["score"] == pytest.approx(nats)
            assert {type(value) for value in got.values()} == {float}


def test_verl_batches_agree_with_single_calls(run_folder, rows):
    """As verl's batch reward manager: NumPy object arrays of one entry per response."""
    extras = np.array([{"prompt_id": row["id"], "rollout_reward_scores": {}} for row in rows[:4]], dtype=object)
    sources = np.array(["mine"] * 4, dtype=object)
    batch = make_batch_compute_score(run_folder)(
        data_sources=sources, solution_strs=TEXTS, ground_truths=[None] * 4, extra_infos=extras
    )
    single = make_compute_score(run_folder)
    assert batch == [single("mine", text, None, extra) for text, extra in zip(TEXTS, extras, strict=True)]


def test_verl_sends_it_to_its_workers(run_folder, rows):
    compute_score = make_compute_score(run_folder, "identity", beta=0.3)
    copy = pickle.loads(pickle.dumps(compute_score))
    extra = {"prompt_id": rows[0]["id"]}
    assert copy("mine", "aei", None, extra) == compute_score("mine", "aei", None, extra)


def test_verl_calls_it_from_several_threads(run_folder, rows):
    """A self-consistent transform changes with every call: the calls must not overlap."""
    compute_score = make_compute_score(run_folder, "self-consistent")
    extra, failures = {"prompt_id": rows[0]["id"]}, []

    def ask():
        try:
            for _ in range(20):
                assert np.isfinite(compute_score("mine", "aei", None, extra)["score"])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    transform = compute_score._reward.transformed.transform
    assert np.abs(transform.cdf - transform.edges).max() > 0.8 * 8 / 9  # 160 responses, 20 steps: all of them counted


@pytest.mark.parametrize("extra_info", [None, {}, {"index": 3}])
def test_verl_without_a_prompt_id(run_folder, extra_info):
    with pytest.raises(InputError, match="extra_info holds no prompt_id"):
        make_compute_score(run_folder)("mine", "x", None, extra_info)


def test_an_unscorable_response_is_an_error(tmp_path, importable, monkeypatch, run_folder, rows):
    import served_rewards

    compute_score = make_compute_score(run_folder)
    monkeypatch.setattr(compute_score._reward.transformed.source, "_function", lambda **_: [None])
    assert served_rewards
    with pytest.raises(RewardError, match="1 of 1 responses have no finite reward"):
        compute_score("mine", "x", None, {"prompt_id": rows[0]["id"]})
