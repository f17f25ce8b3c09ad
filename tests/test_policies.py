"""Adapters come and go; the base stays what it was."""

from dataclasses import replace

import pytest
import torch

from bapo.adapters import AdapterStore, Mix
from bapo.errors import BapoError
from bapo.inference.base import load_base
from bapo.inference.base_responses import base_responses
from bapo.inference.lora_weights import read_lora
from bapo.inference.policies import Policies
from tests.tiny import make_adapter


def weights(model):
    """Every weight of the base by its shape and sum: the layers that hold them have changed, they have not."""
    return sorted((tuple(weight.shape), weight.double().sum().item()) for weight in model.state_dict().values())


def logits(policies, adapters, ids):
    with torch.inference_mode():
        rows = policies.gather(adapters)
        return policies.forward(rows, input_ids=torch.tensor([ids] * len(adapters))).logits


def size_of(base, adapter):
    return read_lora(adapter.folder, torch.float32, base.model.device).bytes


def test_the_base_is_never_altered(tiny_engine, tiny_folders, architecture, settings):
    base, ids = tiny_engine.base, tiny_engine.base.encode_prompt("hello")
    plain = load_base(replace(settings, base=str(tiny_folders[architecture]))).model
    answer = plain(input_ids=torch.tensor([ids])).logits
    mixed = logits(tiny_engine._policies, [None, tiny_engine.store.named("P2A-dpo")], ids)
    torch.testing.assert_close(mixed[:1], answer, rtol=0, atol=1e-5)
    assert (mixed[0] - mixed[1]).abs().max() > 0.1
    torch.testing.assert_close(base.model(input_ids=torch.tensor([ids])).logits, answer, rtol=0, atol=1e-5)
    assert weights(base.model) == weights(plain)


def test_the_base_is_held_once(llama_base, settings):
    before = {weight.data_ptr() for weight in llama_base.model.parameters() if weight.dim() == 1}
    policies = Policies(llama_base, 2**20, settings.cache, exact=True)
    held = {storage.data_ptr(): storage.nbytes() for storage in storages(llama_base.model)}
    assert sum(held.values()) == sum(weight.nbytes for weight in set(llama_base.model.parameters()))
    assert before <= set(held), "what is not a linear layer stays where it was"
    again = Policies(llama_base, 2**20, settings.cache, exact=True)
    assert again._model is policies._model
    assert {storage.data_ptr() for storage in storages(llama_base.model)} == set(held)


def storages(model):
    return [weight.untyped_storage() for weight in model.parameters()]


def test_least_recently_used_adapters_leave(tiny_engine, settings):
    by_name = {adapter.name: adapter for adapter in tiny_engine.store.adapters()}
    two = size_of(tiny_engine.base, by_name["literature-bapo"]) + size_of(tiny_engine.base, by_name["literature-dpo"])
    policies = Policies(tiny_engine.base, two, settings.cache, exact=True)
    ids = tiny_engine.base.encode_prompt("hello")
    policies.require([by_name["P2A-dpo"], by_name["literature-dpo"]])
    first = logits(policies, [by_name["P2A-dpo"]], ids)
    policies.require([by_name["P2A-dpo"]])
    policies.require([by_name["literature-bapo"]])
    assert policies.resident == ["P2A-dpo", "literature-bapo"]
    policies.require([None, Mix(((by_name["literature-dpo"], 0.5), (by_name["literature-bapo"], 0.5)))])
    assert policies.resident == ["literature-dpo", "literature-bapo"]
    assert torch.equal(logits(policies, [by_name["P2A-dpo"]], ids), first)


def test_one_calls_adapters_stay_beyond_the_limit_and_rows_outlive_eviction(tiny_engine, settings):
    one, *others = tiny_engine.store.adapters()
    policies = Policies(tiny_engine.base, 0, settings.cache, exact=True)
    ids = torch.tensor([tiny_engine.base.encode_prompt("hello")])
    with torch.inference_mode():
        rows = policies.gather([one])
        before = policies.forward(rows, input_ids=ids).logits
        policies.require(others)
        assert policies.resident == [adapter.name for adapter in others]
        assert torch.equal(policies.forward(rows, input_ids=ids).logits, before)


def test_two_owners_adapters_of_one_name_are_two(llama_base, settings, tmp_path):
    ann = AdapterStore(tmp_path / "ann", llama_base.name, llama_base.fingerprint)
    bob = AdapterStore(tmp_path / "bob", llama_base.name, llama_base.fingerprint)
    for seed, store in enumerate((ann, bob)):
        make_adapter(llama_base, store, "mine", "bapo", seed)
    theirs = [store.named("mine-bapo") for store in (ann, bob)]
    mixed = logits(Policies(llama_base, 2**20, settings.cache), theirs, llama_base.encode_prompt("hello"))
    assert (mixed[0] - mixed[1]).abs().max() > 0.1


def test_an_adapter_trained_again_replaces_the_one_in_memory(tiny_folders, llama_base, settings):
    store = AdapterStore(settings.adapters, llama_base.name, llama_base.fingerprint)
    ids = llama_base.encode_prompt("hello")
    policies = Policies(llama_base, 2**20, settings.cache)
    answers = []
    for seed in (1, 2):
        trainer = load_base(replace(settings, base=str(tiny_folders["llama"])))  # training has its own copy
        make_adapter(trainer, store, "P2A", "dpo", seed)
        answers.append(logits(policies, store.adapters(), ids))
    assert not torch.allclose(*answers, atol=0.1)


def test_a_damaged_adapter_is_a_sentence_and_the_others_go_on(tiny_engine, settings):
    by_name = {adapter.name: adapter for adapter in tiny_engine.store.adapters()}
    (by_name["P2A-dpo"].folder / "adapter_model.safetensors").write_bytes(b"damaged")
    policies = Policies(tiny_engine.base, 2**20, settings.cache)
    policies.require([by_name["P2A-bapo"]])
    for _ in range(2):
        with pytest.raises(BapoError, match="P2A-dpo cannot be loaded.*train it again"):
            policies.require([by_name["P2A-dpo"]])
    ids = tiny_engine.base.encode_prompt("hello")
    assert policies.resident == ["P2A-bapo"]
    assert logits(policies, [by_name["P2A-bapo"]], ids).isfinite().all()


def test_cached_base_responses_are_the_greedy_ones(tiny_base, settings):
    prompts = ["hello", "why?", "a much longer prompt than the others are"]
    told = []
    answers = base_responses(tiny_base, prompts, settings.cache, max_tokens=16, progress=lambda *at: told.append(at))
    for prompt in prompts:
        ids = torch.tensor([tiny_base.encode_prompt(prompt)])
        expected = tiny_base.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=16,
            eos_token_id=sorted(tiny_base.stop_ids),
            pad_token_id=tiny_base.end_of_turn,
        )[0, ids.shape[1] :].tolist()
        assert answers[prompt].token_ids == expected
        assert answers[prompt].complete == (expected[-1] in tiny_base.stop_ids)
    assert told == [(0, 3), (3, 3)]


def test_base_responses_come_from_the_disk_the_second_time(tiny_base, settings, monkeypatch):
    first = base_responses(tiny_base, ["hello"], settings.cache, max_tokens=8)
    monkeypatch.setattr(tiny_base.model, "generate", lambda *a, **k: (_ for _ in ()).throw(AssertionError("generated")))
    assert base_responses(tiny_base, ["hello"], settings.cache, max_tokens=8) == first
