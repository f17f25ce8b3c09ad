"""Whatever comes and goes meanwhile, each request gets the text that it gets alone."""

import random

import pytest

from bapo.adapters import Mix
from bapo.inference import openings
from bapo.inference.decoding import Row, Sampling, decode
from bapo.inference.policies import Policies
from tests.tiny import make_adapter

SCHEDULES = 500
KINDS = ("one", "three", "five", "mix")
PROMPTS = ("a", "why?", "tell me more of it")


def request(policies, store, prompt, kind, sampling):
    adapters = [store.named(name) for name in ("P2A-dpo", "P2A-bapo", "literature-dpo")]
    rows = {
        "one": [Row(adapters[0])],
        "three": [Row(None), Row(adapters[0]), Row(adapters[1])],
        "five": [Row(None), Row(adapters[0]), Row(adapters[1]), Row(adapters[0], 0), Row(adapters[1], 0)],
        "mix": [Row(None), Row(Mix(((adapters[1], 0.5), (adapters[2], 0.5)))), Row(adapters[2], 1)],
    }[kind]
    return decode(policies, policies.base.encode_prompt(prompt), rows, sampling)


@pytest.fixture
def store(llama_base, settings):
    from bapo.adapters import AdapterStore

    store = AdapterStore(settings.adapters, llama_base.name, llama_base.fingerprint)
    for seed, (preference, method) in enumerate([("P2A", "dpo"), ("P2A", "bapo"), ("literature", "dpo")]):
        make_adapter(llama_base, store, preference, method, seed, rank=2 + seed)
    return store


def test_random_schedules_give_each_request_its_own_text(llama_base, store, settings, monkeypatch):
    monkeypatch.setattr(openings, "SHORTEST", 1)
    monkeypatch.setattr(openings, "HELD_BYTES", 10_000)  # of two or three
    policies = Policies(llama_base, 2**20, settings.cache)
    alone = {}

    def text_alone(*of):
        if of not in alone:
            prompt, kind, length, seed = of
            alone[of] = list(request(policies, store, prompt, kind, sampling(length, seed)))
        return alone[of]

    def sampling(length, seed):
        return Sampling(max_new_tokens=length, temperature=0.8 if seed else 0.0, seed=seed)

    choose = random.Random(0)
    for number in range(SCHEDULES):
        waiting = [
            (choose.choice(PROMPTS), choose.choice(KINDS), choose.randint(1, 6), choose.randint(0, 2))
            for _ in range(choose.randint(2, 4))
        ]  # fmt: skip
        for of in waiting:
            text_alone(*of)
        running: list[tuple[tuple, object, list]] = []
        while waiting or running:
            event = choose.random()
            if waiting and (event < 0.3 or not running):
                of = waiting.pop()
                running.append((of, request(policies, store, of[0], of[1], sampling(of[2], of[3])), []))
            elif event < 0.4:
                policies.memory = choose.choice([0, 4000, 2**20])
                policies.require(choose.sample(store.adapters(), choose.randint(0, 2)))
            elif event < 0.45:
                of, stream, seen = running.pop(choose.randrange(len(running)))  # a visitor stops
                stream.close()
                assert seen == text_alone(*of)[: len(seen)], f"schedule {number}"
            else:
                place = choose.randrange(len(running))
                of, stream, seen = running[place]
                step = next(stream, None)
                if step is None:
                    assert seen == text_alone(*of), f"schedule {number}"
                    del running[place]
                else:
                    seen.append(step)
    assert len(alone) > 50
