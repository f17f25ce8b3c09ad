"""The base's answers to many prompts at once are those that `generate` gives to each alone."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model

from bapo.inference.base import load_base
from bapo.inference.greedy_batch import GreedyBatch
from bapo.inference.policies import Policies
from bapo.inference.products import MANY, ONE_PASS, TRANSPOSED
from bapo.training.fused_layer import fuse_layers
from tests.tiny import logps_apart

PROMPTS = [[5, 17, 3], [80, 41, 9, 2, 6, 33, 90], [7], [60, 61, 62, 63, 64], [11, 12], [40] * 30]
TOKENS = 40
NEVER = [999_999]  # no token of any vocabulary


def alone(model, prompt: list[int], stop_ids: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    return model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=TOKENS,
        eos_token_id=stop_ids, pad_token_id=0,
    )[0, len(prompt) :].tolist()  # fmt: skip


@pytest.mark.parametrize("way", [ONE_PASS, TRANSPOSED])
def test_answers_are_those_of_generate_and_the_model_stays_as_it_was(tiny_base, settings, way):
    model = tiny_base.model
    before = {name: (type(module), module) for name, module in model.named_modules()}
    # Stop tokens that some of the answers contain, so that rows leave early and at different steps.
    stop_ids = [alone(model, prompt, NEVER)[place] for prompt, place in zip(PROMPTS, (3, 9, 20), strict=False)]
    expected = [alone(model, prompt, stop_ids) for prompt in PROMPTS]
    assert len({len(answer) for answer in expected}) >= 3, "rows must leave at different steps"
    batch = GreedyBatch.of(model, 30 + TOKENS, settings.cache)
    for product in batch._mixed.products:
        product.exact_ways = [way] * (MANY + 1)
    answers = batch.answers(PROMPTS, TOKENS, frozenset(stop_ids))
    assert [answer.token_ids for answer in answers] == expected
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert answer.logp == pytest.approx(logps_apart(model, prompt, [answer.token_ids]).item(), abs=1e-3)
    assert {name: (type(module), module) for name, module in model.named_modules()} == before
    assert [alone(model, prompt, stop_ids) for prompt in PROMPTS] == expected
    storages = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    assert {weight.untyped_storage().data_ptr() for weight in batch._model.parameters()} == storages, "no weight twice"


def test_a_model_with_fused_layers_and_one_that_serves_policies_answer_too(tiny_folders, settings):
    base = load_base(replace(settings, base=str(tiny_folders["llama"])))
    expected = [alone(base.model, prompt, [0]) for prompt in PROMPTS]
    fuse_layers(base.model)
    answers = GreedyBatch.of(base.model, 100, settings.cache).answers(PROMPTS, TOKENS, frozenset({0}))
    assert [answer.token_ids for answer in answers] == expected
    served = load_base(replace(settings, base=str(tiny_folders["llama"])))
    Policies(served, 2**20, settings.cache)
    batch = GreedyBatch.of(served.model, 100, settings.cache)
    assert batch._model is served.model
    assert [answer.token_ids for answer in batch.answers(PROMPTS, TOKENS, frozenset({0}))] == expected


def test_as_many_rows_as_the_cache_has_room_for(llama_base, settings, monkeypatch):
    batch = GreedyBatch.of(llama_base.model, 100, settings.cache)
    assert batch._step.cache_bytes == 2 * 2 * 16 * 4, "layers × (keys and values) × their width × 4 bytes"
    lengths = [10, 10, 20, 30]
    assert batch.fitting(lengths, 40) == 4 and batch.fitting([10] * 50, 40) == 32
    # Rows are padded to the longest: two take 2 × 50 positions, three 3 × 60, four 4 × 70.
    for positions, rows in ((279, 3), (180, 3), (179, 2), (49, 1)):
        monkeypatch.setattr("bapo.inference.greedy_batch.CACHE_BYTES", positions * 256)
        assert batch.fitting(lengths, 40) == rows


def test_what_it_cannot_take_is_left_to_generate(tiny_base, architecture, settings):
    model = tiny_base.model
    assert (GreedyBatch.of(model, 257, settings.cache) is None) == (architecture == "phi3"), "longrope switches at 256"
    assert GreedyBatch.of(model, 256, settings.cache)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["down_proj"]), model)
    assert GreedyBatch.of(model, 100, settings.cache) is None
    model.to(torch.float64)
    assert GreedyBatch.of(model, 100, settings.cache) is None
