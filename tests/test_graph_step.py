"""Recorded steps against the model's own. A graph is CUDA's; here "recording" a step is keeping it to be run again,
which shares everything with a graph but the device: fixed addresses, fixed shapes, the position as a tensor."""

from dataclasses import replace

import pytest
import torch

from bapo.adapters import AdapterStore
from bapo.inference.base import load_base
from bapo.inference.decoder_step import DecoderStep
from bapo.inference.decoding import Row, Sampling, decode
from bapo.inference.graph_step import GraphStep
from bapo.inference.policies import Policies
from bapo.inference.roomy_cache import roomy_cache
from tests.tiny import byte_tokenizer, make_adapter, tiny_model

PROMPTS = ["Why do leaves fall?", "And why is the night dark?"]
ROWS = [None, "P2A-dpo", "literature-bapo"]


class Recorder:
    """Counts the recordings, and the steps that were only repeated."""

    def __init__(self):
        self.recorded = self.repeated = 0

    def __call__(self, run):
        self.recorded += 1

        def replay():
            self.repeated += 1
            return run()

        return replay


@pytest.fixture
def policies(tiny_engine, settings, monkeypatch):
    monkeypatch.setattr("bapo.inference.roomy_cache.ROOM", 8)  # so that buffers are replaced on the way
    return Policies(tiny_engine.base, 2**20, settings.cache, exact=True)


@pytest.fixture
def streams(tiny_engine, policies):
    """One stream for each of two visitors; the base and two adapters each, and rows that follow the base."""

    def made():
        store = tiny_engine.store
        rows = [Row(name and store.named(name)) for name in ROWS]
        rows += [Row(row.policy, 0) for row in rows[1:]]
        return [
            decode(policies, policies.base.encode_prompt(prompt), rows, Sampling(max_new_tokens=40))
            for prompt in PROMPTS
        ]

    return made


def assert_alike(found, expected):
    assert [[(t.row, t.token_id, t.last) for t in step] for step in found] == [
        [(t.row, t.token_id, t.last) for t in step] for step in expected
    ]
    for ours, theirs in zip(found, expected, strict=True):
        assert [t.logp for t in ours] == pytest.approx([t.logp for t in theirs], abs=1e-3)


def test_visitors_in_turn_hear_what_they_hear_alone(policies, streams):
    # The base's answer ends early, so that rows leave: it and those that follow it.
    answer = [step[0].token_id for step in streams()[0]]
    policies.base.stop_ids = frozenset({answer[17]})
    expected = [list(stream) for stream in streams()]
    assert len(expected[0][0]) == 5 and any(len(step) < 5 for step in expected[0])
    recorder = Recorder()
    policies._step = GraphStep(policies.base.model, recorder)
    found = [[], []]
    going = list(enumerate(streams()))
    while going:
        for number, stream in list(going):
            for _ in range(3):
                if (step := next(stream, None)) is None:
                    going.remove((number, stream))
                    break
                found[number].append(step)
    for ours, theirs in zip(found, expected, strict=True):
        assert_alike(ours, theirs)
    assert 2 < recorder.recorded < 16 and recorder.repeated > 40, "most steps are repeated ones"


@pytest.mark.parametrize("fault", ["cannot be recorded", "other logits", "no numbers"])
def test_after_a_recording_that_went_wrong_the_model_goes_on_alone(policies, streams, caplog, fault):
    expected = list(streams()[0])

    def record(run):
        if fault == "cannot be recorded":
            raise RuntimeError("operation not permitted when stream is capturing")
        return lambda: run().roll(1, 1) if fault == "other logits" else run() * float("nan")

    policies._step = GraphStep(policies.base.model, record)
    assert_alike(list(streams()[0]), expected)
    assert len(caplog.records) == 1 and "without CUDA graphs" in caplog.text


def test_a_graph_is_for_cuda_alone(tiny_base):
    assert GraphStep.of(tiny_base.model) is None


def test_a_sliding_window_that_the_answer_stays_within_is_none(settings, tmp_path, monkeypatch):
    tokenizer = byte_tokenizer("phi3")
    model = tiny_model("phi3", tokenizer, longrope=False)
    model.config.sliding_window = 48
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "window")
    base = load_base(replace(settings, base=str(tmp_path / "window")))
    store = AdapterStore(settings.adapters, base.name, base.fingerprint)
    make_adapter(base, store, "mine", "dpo", 1)
    policies = Policies(base, 2**20, settings.cache, exact=True)
    prompt, stepped, step = list(range(20, 40)), [], DecoderStep.__call__
    monkeypatch.setattr(DecoderStep, "__call__", lambda self, *inputs: stepped.append(1) or step(self, *inputs))
    base.stop_ids = frozenset()
    for new, ours in ((28, True), (29, False)):
        stepped.clear()
        rows = [Row(None), Row(store.named("mine-dpo"))]
        steps = list(decode(policies, prompt, rows, Sampling(max_new_tokens=new)))
        assert bool(stepped) == ours and policies._step.takes(roomy_cache(base.model, 20 + new)) == ours
        own = [step[0].token_id for step in steps]
        plain = load_base(replace(settings, base=str(tmp_path / "window"))).model
        with torch.no_grad():
            logits = plain(input_ids=torch.tensor([prompt + own])).logits[0, 19:-1]
        assert own == logits.argmax(-1).tolist()
