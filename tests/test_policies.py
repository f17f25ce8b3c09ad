"""Adapters come and go; the base stays what it was."""

from dataclasses import replace

import pytest
import torch

from bapo.adapters import AdapterStore
from bapo.errors import BapoError
from bapo.inference.base import load_base
from bapo.inference.base_responses import base_responses
from bapo.inference.policies import Policies
from tests.tiny import make_adapter


def weights(model):
    return {
        name.replace("base_layer.", ""): parameter.clone()
        for name, parameter in model.named_parameters()
        if "lora_" not in name
    }


def logits(policies, names, ids):
    keys = {adapter.name: key for key, adapter in policies._resident.items()}
    with torch.inference_mode():
        return policies.forward(
            [name and keys[name] for name in names], input_ids=torch.tensor([ids] * len(names))
        ).logits


def test_the_base_is_never_altered(tiny_engine):
    base, ids = tiny_engine.base, tiny_engine.base.encode_prompt("hello")
    before, answer = weights(base.model), base.model(input_ids=torch.tensor([ids])).logits
    policies = Policies(base, limit=2)
    policies.require(tiny_engine.store.adapters())
    mixed = logits(policies, [None, "P2A-dpo"], ids)
    torch.testing.assert_close(mixed[:1], answer, rtol=0, atol=1e-5)
    assert (mixed[0] - mixed[1]).abs().max() > 0.1
    with policies.base_alone() as alone:
        torch.testing.assert_close(alone.model(input_ids=torch.tensor([ids])).logits, answer, rtol=0, atol=0)
    after = weights(base.model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_least_recently_used_adapters_leave(tiny_engine):
    by_name = {adapter.name: adapter for adapter in tiny_engine.store.adapters()}
    policies = Policies(tiny_engine.base, limit=2)
    ids = tiny_engine.base.encode_prompt("hello")
    policies.require([by_name["P2A-dpo"], by_name["P2A-bapo"]])
    first = logits(policies, ["P2A-dpo"], ids)
    policies.require([by_name["P2A-dpo"]])
    policies.require([by_name["literature-dpo"]])
    assert policies.resident == ["P2A-dpo", "literature-dpo"]
    policies.require([by_name["P2A-bapo"], by_name["literature-bapo"]])
    assert policies.resident == ["P2A-bapo", "literature-bapo"]
    policies.require([by_name["P2A-dpo"]])
    assert torch.equal(logits(policies, ["P2A-dpo"], ids), first)


def test_two_owners_adapters_of_one_name_are_two(llama_base, settings, tmp_path):
    ann = AdapterStore(tmp_path / "ann", llama_base.name, llama_base.fingerprint)
    bob = AdapterStore(tmp_path / "bob", llama_base.name, llama_base.fingerprint)
    for seed, store in enumerate((ann, bob)):
        make_adapter(llama_base, store, "mine", "bapo", seed)
    theirs = [store.named("mine-bapo") for store in (ann, bob)]
    policies = Policies(llama_base, limit=2)
    policies.require(theirs)
    ids = torch.tensor([llama_base.encode_prompt("hello")] * 2)
    with torch.inference_mode():
        mixed = policies.forward([adapter.key for adapter in theirs], input_ids=ids).logits
    assert (mixed[0] - mixed[1]).abs().max() > 0.1


def test_an_adapter_trained_again_replaces_the_one_in_memory(tiny_folders, llama_base, settings):
    store = AdapterStore(settings.adapters, llama_base.name, llama_base.fingerprint)
    ids = llama_base.encode_prompt("hello")
    policies = Policies(llama_base, limit=2)
    answers = []
    for seed in (1, 2):
        trainer = load_base(replace(settings, base=str(tiny_folders["llama"])))  # training has its own copy
        make_adapter(trainer, store, "P2A", "dpo", seed)
        policies.require(store.adapters())
        answers.append(logits(policies, ["P2A-dpo"], ids))
    assert not torch.allclose(*answers, atol=0.1)


def test_a_damaged_adapter_is_a_sentence_and_the_others_go_on(tiny_engine):
    by_name = {adapter.name: adapter for adapter in tiny_engine.store.adapters()}
    (by_name["P2A-dpo"].folder / "adapter_model.safetensors").write_bytes(b"damaged")
    policies = Policies(tiny_engine.base, limit=4)
    policies.require([by_name["P2A-bapo"]])
    for _ in range(2):
        with pytest.raises(BapoError, match="P2A-dpo cannot be loaded.*train it again"):
            policies.require([by_name["P2A-dpo"]])
    ids = tiny_engine.base.encode_prompt("hello")
    assert policies.resident == ["P2A-bapo"]
    assert logits(policies, ["P2A-bapo"], ids).isfinite().all()


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
