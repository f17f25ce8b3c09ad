"""The opening of the chat template is run once per policy, and nobody can tell."""

import os
import shutil
from dataclasses import replace

import pytest
import torch

from bapo.adapters import WEIGHTS, AdapterStore, Mix
from bapo.inference import openings
from bapo.inference.base import load_base
from bapo.inference.decoding import Row, Sampling, decode
from bapo.inference.policies import Policies
from tests.tiny import make_adapter

NEW = 12


@pytest.fixture(autouse=True)
def any_opening_is_kept(monkeypatch):
    monkeypatch.setattr(openings, "SHORTEST", 1)


@pytest.fixture
def base(llama_base):
    return llama_base


@pytest.fixture
def adapters(base, settings):
    store = AdapterStore(settings.adapters, base.name, base.fingerprint)
    for seed, method in enumerate(("dpo", "bapo")):
        make_adapter(base, store, "late", method, seed, layers=[1])
    return [store.named("late-dpo"), store.named("late-bapo")]


def opened(base, settings):
    policies = Policies(base, 2**20, settings.cache, exact=True)
    assert len(policies.openings.token_ids) == 6, "<|im_start|>, user and a line break, every byte a token"
    return policies


def counted(monkeypatch):
    """Token counts of all prefills from here on."""
    counts, forward = [], Policies.forward

    def count(self, rows, exact=True, **inputs):
        counts.append(inputs["input_ids"].shape[1])
        return forward(self, rows, exact, **inputs)

    monkeypatch.setattr(Policies, "forward", count)
    return counts


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
@pytest.mark.parametrize("layers", [None, [1]])  # adapted everywhere, or from the second layer on
def test_prompts_continue_the_opening(tiny_engine, tiny_folders, architecture, settings, dtype, tolerance, layers):
    base = load_base(replace(settings, base=str(tiny_folders[architecture])))
    store = AdapterStore(settings.adapters, base.name, base.fingerprint)
    if layers:
        for seed, method in enumerate(("dpo", "bapo")):
            make_adapter(base, store, "late", method, seed, layers=layers)
    found = list(store.for_preference("late" if layers else "P2A").values())
    chosen = [None, *found, Mix(((found[0], 0.5), (found[1], 0.25)))]
    base.model.to(dtype)
    policies = Policies(base, 2**20, settings.cache, exact=True)
    assert bool(policies.openings.token_ids) == (architecture != "phi3"), "longrope turns first tokens by all lengths"
    prompt, steps = base.encode_prompt("why?"), torch.tensor([[7, 8, 9, 10], [30, 20, 10, 5]])
    both = []
    for token_ids in (policies.openings.token_ids, []):
        policies.openings.token_ids = token_ids
        with torch.inference_mode():
            rows, logits, cache = policies.prefill(chosen, prompt, NEW)
            assert cache.get_seq_length() == len(prompt)
            both.append(torch.stack([logits, *(policies.step(rows, True, tokens, cache) for tokens in steps)]))
    torch.testing.assert_close(both[0], both[1], rtol=0, atol=tolerance)
    assert (both[0][:, 1:] - both[0][:, :1]).abs().amax(-1).min() > 0.01, "every policy has its own"


def test_an_opening_is_run_once_and_then_read(base, adapters, settings, monkeypatch):
    counts = counted(monkeypatch)
    prompt = base.encode_prompt("why?")
    rest = len(prompt) - 6
    policies = opened(base, settings)
    first = answers(policies, [None, *adapters], prompt)
    assert counts == [6, 6, 6, rest], "each alone"
    assert answers(policies, [None, *adapters], prompt) == first
    again = opened(base, settings)
    assert answers(again, [None, *adapters], prompt) == first
    assert counts == [6, 6, 6, rest, rest, rest], "from the disk"
    assert len(list((settings.cache / "openings").iterdir())) == 3


def answers(policies, chosen, prompt):
    stream = decode(policies, prompt, [Row(policy) for policy in chosen], Sampling(max_new_tokens=NEW), exact=True)
    return [step for step in stream]


def test_what_was_asked_before_changes_no_bit(base, adapters, settings):
    """Alone or together, first or last: an opening is the same."""
    prompt, found = base.encode_prompt("why?"), []
    for before in ([], [adapters[:1], [None, *adapters]], [adapters, [None]]):
        shutil.rmtree(settings.cache / "openings", ignore_errors=True)
        policies = opened(base, settings)
        with torch.inference_mode():
            for chosen in before:
                policies.prefill(chosen, prompt, NEW)
            _, logits, _ = policies.prefill([None, adapters[1]], prompt, NEW)
        found.append(logits)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_an_adapter_trained_again_gets_a_new_opening(base, adapters, settings, monkeypatch):
    prompt = base.encode_prompt("why?")
    policies = opened(base, settings)
    answers(policies, adapters, prompt)
    store = AdapterStore(settings.adapters, base.name, base.fingerprint)
    trainer = load_base(replace(settings, base=str(base.folder)))  # training has its own copy
    make_adapter(trainer, store, "late", "dpo", 7, layers=[1])
    counts = counted(monkeypatch)
    new = store.named("late-dpo")
    own = answers(policies, [new], prompt)
    assert counts == [6, len(prompt) - 6]
    policies.openings.token_ids = []
    assert [step[0].token_id for step in own] == [step[0].token_id for step in answers(policies, [new], prompt)]


def test_a_damaged_file_is_run_again(base, adapters, settings):
    prompt = base.encode_prompt("why?")
    first = answers(opened(base, settings), adapters, prompt)
    files = list((settings.cache / "openings").iterdir())
    for file in files:
        file.write_bytes(b"damaged")
    assert answers(opened(base, settings), adapters, prompt) == first
    assert min(file.stat().st_size for file in files) > 1000


def test_neither_a_full_disk_nor_a_removed_adapter_stops_an_answer(base, adapters, settings):
    prompt = base.encode_prompt("why?")
    first = answers(opened(base, settings), adapters, prompt)
    shutil.rmtree(settings.cache / "openings")
    (settings.cache / "openings").write_text("in the way")
    policies = opened(base, settings)
    policies.require(adapters)
    (adapters[0].folder / WEIGHTS).unlink()
    assert answers(policies, adapters, prompt) == first


def test_a_file_that_cannot_be_written_stops_no_answer(base, adapters, settings):
    prompt = base.encode_prompt("why?")
    first = answers(opened(base, settings), adapters, prompt)
    files = list((settings.cache / "openings").iterdir())
    for file in files:
        file.unlink()
        file.with_suffix(f".{os.getpid()}").mkdir()
    assert answers(opened(base, settings), adapters, prompt) == first
    assert not any(file.exists() for file in files)


def test_mixes_are_kept_in_memory_alone(base, adapters, settings, monkeypatch):
    counts = counted(monkeypatch)
    mix = Mix(((adapters[0], 0.5), (adapters[1], 0.5)))
    prompt = base.encode_prompt("why?")
    policies = opened(base, settings)
    assert answers(policies, [mix], prompt) == answers(policies, [mix], prompt)
    assert counts.count(6) == 1
    assert not (settings.cache / "openings").exists()


def test_openings_used_last_stay_in_memory(base, adapters, settings, monkeypatch):
    prompt = base.encode_prompt("why?")
    policies = opened(base, settings)
    answers(policies, [None, *adapters], prompt)
    one, *_ = policies.openings._held.values()
    monkeypatch.setattr(openings, "HELD_BYTES", 2 * one.bytes)
    answers(policies, [None], prompt)
    answers(policies, adapters[:1], prompt)
    assert list(policies.openings._held) == [(), ((adapters[0].key, adapters[0].written, 1.0),)]


@pytest.mark.parametrize("text", ["", "Why", "<|im_start|>us"])
def test_prompts_that_begin_otherwise_are_run_whole(base, settings, monkeypatch, text):
    counts = counted(monkeypatch)
    ids = base.tokenizer(text + "x", add_special_tokens=False)["input_ids"]
    answers(opened(base, settings), [None], ids)
    assert counts == [len(ids)]


def test_the_opening_itself_leaves_a_token_to_run(base, settings, monkeypatch):
    counts = counted(monkeypatch)
    policies = opened(base, settings)
    answers(policies, [None], list(policies.openings.token_ids))
    assert counts == [6]
