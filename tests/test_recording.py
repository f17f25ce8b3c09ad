"""The comparison the page opens with is shown only where it would come out again."""

import copy
import json
from dataclasses import replace

import pytest

from bapo.adapters import AdapterStore
from bapo.comparison import compare
from bapo.inference.decoding import Sampling
from bapo.inference.engine import LocalEngine
from bapo.recording import RECORDING, record, recorded_frame
from bapo.settings import REPOSITORY, Settings


@pytest.fixture
def recorded(tiny_engine, tmp_path):
    """A recording of a tiny comparison: (its file, the frame it was made of)."""
    frame = list(compare(tiny_engine, "why?", "P2A", Sampling(max_new_tokens=8)))[-1]
    file = tmp_path / "recording.json"
    file.write_text(json.dumps(record("why?", frame, tiny_engine)), encoding="utf-8")
    return file, frame


def test_a_recording_gives_the_frame_back(tiny_engine, recorded):
    file, frame = recorded
    back = recorded_frame(tiny_engine, file)
    assert back.prompt == "why?"
    assert back.frame.base_tokens == frame.base_tokens
    assert [(a.name, a.text, a.tokens, a.logps) for a in back.frame.answers] == [
        (a.name, a.text, a.tokens, a.logps) for a in frame.answers
    ]
    assert back.frame.drift("dpo") == frame.drift("dpo")


def test_another_base_other_adapters_or_a_broken_file_show_none(tiny_engine, settings, recorded, tmp_path):
    file, _ = recorded
    engine = LocalEngine(replace(tiny_engine.base, fingerprint="another"), tiny_engine.store, settings)
    assert recorded_frame(engine, file) is None
    (tiny_engine.store.folder / "P2A-dpo" / "adapter_model.safetensors").write_bytes(b"trained again")
    assert recorded_frame(tiny_engine, file) is None
    file.write_text(file.read_text()[:50])
    assert recorded_frame(tiny_engine, file) is None
    assert recorded_frame(tiny_engine, tmp_path / "absent.json") is None


def test_the_shipped_recording_comes_out_again(real_base):
    store = AdapterStore(REPOSITORY / "adapters", real_base.name, real_base.fingerprint)
    # Adapters wrap a model's layers in place; the session's base stays plain.
    engine = LocalEngine(replace(real_base, model=copy.deepcopy(real_base.model)), store, Settings())
    shipped = recorded_frame(engine)
    assert shipped is not None, f"{RECORDING.name} was made with another base or other adapters: record it again"
    tokens = max(answer.tokens for answer in shipped.frame.answers)
    again = list(compare(engine, shipped.prompt, shipped.frame.preference, Sampling(max_new_tokens=tokens)))[-1]
    # The first words: further on, another processor's rounding may turn a near tie.
    for ours, theirs in zip(again.answers, shipped.frame.answers, strict=True):
        assert ours.text[:40] == theirs.text[:40]
    for method in ("dpo", "bapo"):
        assert again.drift(method).nats == pytest.approx(shipped.frame.drift(method).nats, rel=0.2, abs=2)
