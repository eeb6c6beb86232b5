"""Stored evaluations: whole, or refused with a hint."""

import json

import pytest

import infalign as ia
from infalign.errors import InputError, StorageError
from infalign.evaluation.predictability import with_predictability
from infalign.evaluation.record import Evaluation
from tests.evaluation.test_runs import evaluation, gaussian


def test_survives_json(tmp_path):
    original = evaluation(gaussian("a", 0.5), warnings=["mind this"], settings={"seed": 1})
    (tmp_path / "evaluation.json").write_text(json.dumps(original.to_dict(), allow_nan=False))
    assert Evaluation.read(tmp_path) == original


def test_predictability_survives_json_and_may_be_missing(tmp_path):
    results, found = with_predictability([gaussian("identity", 0.5)], [ia.BestOfN(4), ia.Standard()])
    original = evaluation(*results, predictability=found)
    content = original.to_dict()
    (tmp_path / "evaluation.json").write_text(json.dumps(content, allow_nan=False))
    assert Evaluation.read(tmp_path) == original
    assert content["predictability"]["policy"] == "identity"
    # Files of earlier versions have neither.
    del content["predictability"]
    for result in content["results"]:
        for entry in result["procedures"]:
            del entry["predictable_limit"]
    (tmp_path / "evaluation.json").write_text(json.dumps(content, allow_nan=False))
    old = Evaluation.read(tmp_path)
    assert old.predictability is None
    assert old.results[0].procedures[0].predictable_limit is None


@pytest.mark.parametrize("missing", ["results", "reference", "stores"])
def test_earlier_versions_are_refused(tmp_path, missing):
    content = evaluation(gaussian("a", 0.5)).to_dict()
    del content[missing]
    (tmp_path / "evaluation.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"not written by this infalign .*with the same command") as told:
        Evaluation.read(tmp_path)
    assert f"'{missing}'" not in told.value.what


def test_what_wrote_a_result_is_named_and_no_field_of_it(tmp_path):
    content = evaluation(gaussian("a", 0.5), versions={"infalign": "0.0.1"}).to_dict()
    del content["results"][0]["over_n"]
    content["results"][0]["series_of_old"] = 1
    (tmp_path / "evaluation.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"were written by infalign 0\.0\.1; this is") as told:
        Evaluation.read(tmp_path)
    assert "over_n" not in str(told.value)
    assert "series_of_old" not in str(told.value)


@pytest.mark.parametrize("content", ["[]", "1", '{"results": [1], "versions": 2}', '{"results": null}'])
def test_what_is_no_evaluation_is_refused(tmp_path, content):
    (tmp_path / "evaluation.json").write_text(content)
    with pytest.raises(InputError, match="not written by this infalign"):
        Evaluation.read(tmp_path)


def test_a_cut_off_file_is_named(tmp_path):
    (tmp_path / "evaluation.json").write_text('{"name": ')
    with pytest.raises(StorageError, match=r"evaluation\.json: the evaluation cannot be read"):
        Evaluation.read(tmp_path)
