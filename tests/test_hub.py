"""Names of models that are not there: said at once, in one message."""

import huggingface_hub
import pytest

from infalign._io.hub import require_model
from infalign.errors import InputError
from infalign.rewards.source import SequenceClassificationReward
from infalign.rollouts.key import model_fingerprint
from infalign.rollouts.models import load_tokenizer
from infalign.rollouts.prompts import load_prompts

LOADERS = [load_tokenizer, model_fingerprint, SequenceClassificationReward]


@pytest.fixture
def no_network(monkeypatch):
    """A hub that nothing listens for."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("name", ["./absent", "/absent", "~/absent", "runs/absent/model", "runs\\absent"])
def test_a_path_that_is_not_there(load, name):
    with pytest.raises(InputError, match="there is no such folder") as told:
        load(name)
    assert told.value.where == name


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("name", ["absent", "nobody/absent"])
def test_a_name_without_a_network(no_network, capfd, load, name):
    with pytest.raises(InputError, match=r"no folder of this name, and the hub cannot be reached \(.+\) and this"):
        load(name)
    assert "Retrying" not in capfd.readouterr().err  # the hub's client waits 23 seconds for each file


def test_a_name_with_the_hub_switched_off(no_network, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="switched off"):
        require_model("nobody/absent")


def test_a_data_set_without_a_network(no_network, capfd):
    with pytest.raises(InputError, match=r"no file or folder of this name, and the hub cannot be reached"):
        load_prompts("nobody/absent-prompts")
    assert "Retrying" not in capfd.readouterr().err


def test_what_no_model_can_be_called(no_network):
    with pytest.raises(InputError, match="cannot be the name of a model"):
        require_model("a b")


def test_a_copy_on_this_machine_is_enough(no_network, tmp_path, monkeypatch):
    require_model(tmp_path)
    snapshot = tmp_path / "models--nobody--there" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (tmp_path / "models--nobody--there" / "refs").mkdir()
    (tmp_path / "models--nobody--there" / "refs" / "main").write_text("0123")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    require_model("nobody/there")
