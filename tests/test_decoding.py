"""Every row says what plain transformers + PEFT would say with that adapter alone."""

from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from peft import PeftModel

from bapo.adapters import AdapterStore
from bapo.errors import BapoError
from bapo.inference.base import load_base
from bapo.inference.decoding import Row, Sampling, decode
from bapo.inference.engine import LocalEngine
from bapo.inference.policies import Policies
from tests.tiny import make_adapter

PROMPT = "Why do leaves fall?"
LENGTH = 24


def exact(engine_or_base, settings):
    return Policies(getattr(engine_or_base, "base", engine_or_base), 2**20, settings.cache, exact=True)


def all_rows(engine, rows, **sampling):
    """row → (token ids, log-probs) of a finished stream; the rows name adapters."""
    policies = exact(engine, engine.settings)
    rows = [replace(row, policy=row.policy and engine.store.named(row.policy)) for row in rows]
    sampling.setdefault("max_new_tokens", LENGTH)
    ids, logps = defaultdict(list), defaultdict(list)
    for step in decode(policies, engine.base.encode_prompt(PROMPT), rows, Sampling(**sampling)):
        for token in step:
            ids[token.row].append(token.token_id)
            logps[token.row].append(token.logp)
    return ids, logps


def alone(engine, tiny_folders, architecture, settings, adapter):
    """The base or a stock PEFT model with one adapter, untouched by our code."""
    base = load_base(replace(settings, base=str(tiny_folders[architecture])))
    if adapter is None:
        return base, base.model
    return base, PeftModel.from_pretrained(base.model, engine.store.folder / adapter).eval()


def token_logps_apart(model, prompt, ids):
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(ids).unsqueeze(1)).squeeze(1)


@pytest.mark.parametrize("adapter", [None, "P2A-dpo", "literature-bapo"])
def test_greedy_rows_equal_generate(tiny_engine, tiny_folders, architecture, settings, adapter):
    rows = [Row(None), Row("P2A-dpo"), Row("literature-bapo"), Row("P2A-dpo", 0), Row("literature-bapo", 0)]
    ids, _ = all_rows(tiny_engine, rows)
    base, model = alone(tiny_engine, tiny_folders, architecture, settings, adapter)
    prompt = torch.tensor([base.encode_prompt(PROMPT)])
    expected = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=LENGTH,
        eos_token_id=sorted(base.stop_ids),
        pad_token_id=base.end_of_turn,
    )[0, prompt.shape[1] :].tolist()
    row = [row.policy for row in rows].index(adapter)
    assert ids[row] == expected
    assert len(set(map(tuple, (ids[0], ids[1], ids[2])))) == 3, "the adapters must change the text"


@pytest.mark.parametrize("adapter", [None, "P2A-dpo", "P2A-bapo"])
def test_rows_report_teacher_forced_logps(tiny_engine, tiny_folders, architecture, settings, adapter):
    rows = [Row(None), Row("P2A-dpo", 0), Row("P2A-bapo", 0)]
    ids, logps = all_rows(tiny_engine, rows, temperature=0.9, seed=3)
    base, model = alone(tiny_engine, tiny_folders, architecture, settings, adapter)
    expected = token_logps_apart(model, base.encode_prompt(PROMPT), ids[0])
    row = [row.policy for row in rows].index(adapter)
    assert ids[row] == ids[0]
    torch.testing.assert_close(torch.tensor(logps[row]), expected, rtol=0, atol=1e-4)


def test_layers_before_the_first_adapted_one_run_the_prompt_once(tiny_base, tiny_folders, architecture, settings):
    store = AdapterStore(settings.adapters, tiny_base.name, tiny_base.fingerprint)
    for seed, method in enumerate(("dpo", "bapo")):
        make_adapter(tiny_base, store, "late", method, seed, layers=[1])
    engine = LocalEngine(tiny_base, store, settings)
    seen = {0: [], 1: []}
    for layer, rows in seen.items():
        norm = tiny_base.model.model.layers[layer].input_layernorm
        norm.register_forward_pre_hook(lambda module, inputs, rows=rows: rows.append(len(inputs[0])))
    ids, logps = all_rows(engine, [Row(None), Row("late-dpo", 0), Row("late-bapo", 0), Row("late-dpo", 0)])
    assert (seen[0], seen[1]) == ([1], [3]), "once each: the steps after the prompt go past the modules"
    for row, adapter in enumerate([None, "late-dpo", "late-bapo", "late-dpo"]):
        base, model = alone(engine, tiny_folders, architecture, settings, adapter)
        expected = token_logps_apart(model, base.encode_prompt(PROMPT), ids[0])
        torch.testing.assert_close(torch.tensor(logps[row]), expected, rtol=0, atol=1e-4)


def test_rows_share_their_random_numbers(tiny_engine):
    ids, _ = all_rows(tiny_engine, [Row(None), Row(None), Row("P2A-dpo")], temperature=1.0, seed=5)
    again, _ = all_rows(tiny_engine, [Row(None)], temperature=1.0, seed=5)
    other, _ = all_rows(tiny_engine, [Row(None)], temperature=1.0, seed=6)
    assert ids[0] == ids[1] == again[0]
    assert ids[0] != ids[2]
    assert ids[0] != other[0]


def test_gumbel_draws_follow_the_softmax_cut_by_top_p():
    from bapo.inference.decoding import _choose, _gumbel

    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    generator = torch.Generator().manual_seed(0)
    for top_p, expected in ((1.0, [0.5, 0.3, 0.15, 0.05]), (0.75, [0.625, 0.375, 0, 0])):
        sampling = Sampling(temperature=1.0, top_p=top_p)
        draws = torch.cat([_choose(logits, sampling, _gumbel(4, generator)) for _ in range(4000)])
        shares = draws.bincount(minlength=4) / 4000
        # five standard deviations of a share at 4000 draws
        torch.testing.assert_close(shares, torch.tensor(expected), rtol=0, atol=0.04)


def test_a_row_that_ends_leaves_and_the_others_go_on(llama_base, settings):
    policies = exact(llama_base, settings)
    prompt = llama_base.encode_prompt(PROMPT)
    free = [step[0].token_id for step in decode(policies, prompt, [Row(None)], Sampling(max_new_tokens=12))]
    llama_base.stop_ids = frozenset({free[4]})  # the greedy row now ends at its fifth token at the latest
    first = free.index(free[4])
    steps = list(decode(policies, prompt, [Row(None), Row(None, 0)], Sampling(max_new_tokens=12)))
    assert [[token.token_id for token in step] for step in steps] == [[t, t] for t in free[: first + 1]]
    assert [token.last for token in steps[-1]] == [True, True]
    assert not any(token.last for step in steps[:-1] for token in step)


def test_uneven_rows_keep_their_own_text(tiny_engine):
    rows = [Row(None), Row("P2A-dpo"), Row("P2A-bapo"), Row("P2A-dpo", 0)]
    free, _ = all_rows(tiny_engine, rows)
    # Stop the DPO row early: its token there must not occur before in any row.
    for place in range(2, LENGTH):
        stop = free[1][place]
        if all(stop not in free[row][:place] for row in range(3)) and stop not in free[0]:
            break
    else:
        pytest.skip("this architecture's random text repeats itself throughout")
    tiny_engine.base.stop_ids = frozenset({stop})
    ids, _ = all_rows(tiny_engine, rows)
    assert ids[1] == free[1][: place + 1]
    assert ids[0] == free[0]
    assert ids[3] == free[0]


def test_closing_the_stream_stops_the_model(tiny_engine, settings, monkeypatch):
    policies = exact(tiny_engine, settings)
    steps = []
    monkeypatch.setattr(policies, "step", lambda *a, f=policies.step: steps.append(1) or f(*a))
    stream = decode(policies, tiny_engine.base.encode_prompt(PROMPT), [Row(None)], Sampling(max_new_tokens=200))
    next(stream)
    next(stream)
    stream.close()
    assert len(steps) == 1, "the first token comes from the prompt"


@pytest.mark.parametrize(
    "wrong", [{"max_new_tokens": 0}, {"temperature": -0.1}, {"top_p": 0.0}, {"top_p": 1.1}, {"seed": 2**63}]
)
def test_impossible_sampling_is_refused_in_a_sentence(wrong):
    with pytest.raises(BapoError, match="must"):
        Sampling(**wrong)
