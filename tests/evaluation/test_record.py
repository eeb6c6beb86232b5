"""Stored evaluations: whole, or refused with the mend."""

import json

import pytest

from infalign.errors import InputError, StorageError
from infalign.evaluation.record import Evaluation
from tests.evaluation.test_runs import evaluation, gaussian


def test_survives_json(tmp_path):
    original = evaluation(gaussian("a", 0.5), warnings=["mind this"], settings={"seed": 1})
    (tmp_path / "evaluation.json").write_text(json.dumps(original.to_dict(), allow_nan=False))
    assert Evaluation.read(tmp_path) == original


@pytest.mark.parametrize("missing", ["results", "reference", "stores"])
def test_earlier_versions_are_refused(tmp_path, missing):
    content = evaluation(gaussian("a", 0.5)).to_dict()
    del content[missing]
    (tmp_path / "evaluation.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="Run the evaluation again"):
        Evaluation.read(tmp_path)


def test_a_cut_off_file_is_named(tmp_path):
    (tmp_path / "evaluation.json").write_text('{"name": ')
    with pytest.raises(StorageError, match=r"evaluation\.json: the evaluation cannot be read"):
        Evaluation.read(tmp_path)
