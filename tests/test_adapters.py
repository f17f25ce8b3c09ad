"""The store: what is offered, what is refused and why."""

import json

import pytest

from bapo.adapters import AdapterCard, AdapterStore, HeldOut
from bapo.errors import BapoError
from tests.tiny import make_adapter


@pytest.fixture
def store(llama_base, settings):
    return AdapterStore(settings.adapters, llama_base.name, llama_base.fingerprint)


def test_a_card_survives_writing_and_reading(tmp_path):
    held_out = HeldOut(prompts=2, pairs=4, reward_accuracy=0.75, drift_nats=-1.5, drift_per_token=-0.1)
    card = AdapterCard(
        base="b", base_fingerprint="f", preference="P2A", method="bapo", hyperparameters={"beta": 0.1},
        data_sha256="d", training_pairs=3, held_out=held_out, versions={"torch": "2"},
    )  # fmt: skip
    card.write(tmp_path)
    assert AdapterCard.read(tmp_path) == card


def test_adapters_are_found_by_preference_and_method(llama_base, store):
    for seed, (preference, method) in enumerate([("P2A", "bapo"), ("P2A", "dpo"), ("mine", "bapo")]):
        make_adapter(llama_base, store, preference, method, seed)
    assert [adapter.name for adapter in store.adapters()] == ["P2A-bapo", "P2A-dpo", "mine-bapo"]
    assert {p: sorted(m) for p, m in store.by_preference().items()} == {"P2A": ["bapo", "dpo"], "mine": ["bapo"]}
    with pytest.raises(BapoError, match=r"no adapter for the preference 'P1A'; there are P2A, mine\. Train one"):
        store.for_preference("P1A")


def spoil_missing(folder):
    (folder / "adapter_model.safetensors").unlink()


def spoil_pickle(folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def spoil_card(folder):
    (folder / "bapo.json").write_text("[]")


def spoil_type(folder):
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))


def spoil_config(folder):
    (folder / "adapter_config.json").write_text("[]")


def spoil_base(folder):
    card = json.loads((folder / "bapo.json").read_text())
    (folder / "bapo.json").write_text(json.dumps({**card, "base_fingerprint": "another"}))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (spoil_missing, "adapter_model.safetensors is missing"),
        (spoil_pickle, "adapter_model.safetensors is missing"),
        (spoil_card, "not what it should be"),
        (spoil_config, "not what it should be"),
        (spoil_type, "only LoRA is supported"),
        (spoil_base, "trained on another base"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(llama_base, store, spoil, reason):
    spoil(make_adapter(llama_base, store, "P2A", "bapo", 0))
    assert store.adapters() == []
    assert reason in store.refused()["P2A-bapo"]
    with pytest.raises(BapoError, match=f"P2A-bapo: .*{reason}"):
        store.for_preference("P2A")


def test_hidden_folders_are_work_in_progress(llama_base, store):
    make_adapter(llama_base, store, "P2A", "bapo", 0).rename(store.folder / ".training-x")
    assert store.adapters() == []
    assert store.refused() == {}


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden", "a b"])
def test_names_stay_inside_the_store(store, name):
    with pytest.raises(BapoError, match="letters, digits"):
        store.place(name, "bapo")
