"""Comparing and scoring as services: frames, drift, and one visitor after another."""

import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch
from peft import PeftModel

from bapo.comparison import Answer, BaseToken, Frame, compare, score_pairs
from bapo.errors import BapoError
from bapo.evaluation import Drift, PairLogps, mean_drift, reward_accuracy
from bapo.inference.base import load_base
from bapo.inference.decoding import Sampling
from bapo.inference.detokenizer import Detokenizer
from bapo.inference.turns import Turns
from bapo.pairs import Pair
from bapo.settings import REPOSITORY
from tests.tiny import logps_apart

SHORT = Sampling(max_new_tokens=12)


def last_frame(engine, prompt="why?", preference="P2A", sampling=SHORT) -> Frame:
    return list(compare(engine, prompt, preference, sampling))[-1]


def test_comparing_knows_no_torch():
    code = "import bapo.comparison, bapo.ui.texts, sys; assert not {'torch', 'gradio'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)


def test_drift_by_hand():
    tokens = (
        BaseToken("a", {"base": -1.0, "dpo": -3.5, "bapo": -0.5}),
        BaseToken("b", {"base": -2.0, "dpo": -2.5, "bapo": -2.25}),
    )
    frame = Frame("P2A", "tiny", (Answer("base"), Answer("dpo"), Answer("bapo")), tokens)
    assert frame.drift("dpo") == Drift(3.0, 1.5)
    assert frame.logps_change("dpo") == [-2.5, -3.0]
    assert frame.drift("bapo") == Drift(-0.25, -0.125)
    assert frame.as_dict()["drift"]["dpo"] == {"nats": 3.0, "per_token": 1.5}


def test_reward_accuracy_and_drift_by_hand():
    def pair(prompt, chosen, rejected, base_response):
        return PairLogps(prompt, *({"base": b, "dpo": p} for b, p in (chosen, rejected, base_response)), base_tokens=4)

    pairs = [
        pair("p", (-10, -8), (-10, -9), (-5, -7)),  # +2 against +1: won
        pair("p", (-10, -8), (-10, -6), (-5, -7)),  # +2 against +4: lost
        pair("q", (-10, -12), (-10, -15), (-5, -6)),  # −2 against −5: won
    ]
    assert reward_accuracy(pairs, "dpo") == pytest.approx(2 / 3)
    assert mean_drift(pairs, "dpo") == Drift(1.5, 3 / 8)


def test_a_comparison_has_three_answers_and_two_drifts(tiny_engine):
    frame = last_frame(tiny_engine)
    assert [answer.name for answer in frame.answers] == ["base", "dpo", "bapo"]
    assert all(answer.done and answer.tokens for answer in frame.answers)
    assert frame.done
    assert len(frame.base_tokens) == frame.answers[0].tokens
    assert "".join(token.text for token in frame.base_tokens) == frame.answers[0].text
    printed = frame.as_dict()
    assert list(printed) == ["policies", "drift", "base", "weights", "preference", "seconds", "tokens_per_second"]
    assert list(printed["policies"][0]) == ["name", "text", "tokens", "tokens_per_second", "logps"]


def test_drift_equals_plain_peft_teacher_forced(tiny_engine, tiny_folders, architecture, settings):
    frame = last_frame(tiny_engine)
    base = load_base(replace(settings, base=str(tiny_folders[architecture])))
    prompt = base.encode_prompt("why?")
    generated = base.model.generate(
        input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False,
        max_new_tokens=12, eos_token_id=sorted(base.stop_ids), pad_token_id=base.end_of_turn,
    )[0, len(prompt) :].tolist()  # fmt: skip
    under_base = logps_apart(base.model, prompt, [generated]).item()
    assert frame.answers[0].logps == pytest.approx(under_base, abs=1e-3)
    policy = PeftModel.from_pretrained(base.model, tiny_engine.store.folder / "P2A-dpo").eval()
    under_dpo = logps_apart(policy, prompt, [generated]).item()
    assert frame.drift("dpo").nats == pytest.approx(under_base - under_dpo, abs=1e-3)


def test_streamed_text_is_the_whole_text_with_characters_kept_whole(llama_base):
    text = "héllo 你好, 🙂 and  two spaces\n"
    ids = llama_base.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) > len(text), "some characters take several tokens"
    detokenizer = Detokenizer(llama_base.tokenizer)
    pieces = [detokenizer.push(token, last=i == len(ids)) for i, token in enumerate(ids, start=1)]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_streamed_text_survives_bytes_that_are_no_text(llama_base):
    ids = llama_base.tokenizer("é", add_special_tokens=False)["input_ids"][:1]
    detokenizer = Detokenizer(llama_base.tokenizer)
    assert detokenizer.push(ids[0], last=False) == ""
    assert detokenizer.push(ids[0], last=True) == "\ufffd\ufffd"


def test_changing_the_preference_changes_the_adapters_alone(tiny_engine):
    concise, literature = last_frame(tiny_engine), last_frame(tiny_engine, preference="literature")
    assert concise.answers[0].text == literature.answers[0].text
    assert concise.answers[1].text != literature.answers[1].text
    again = last_frame(tiny_engine)
    assert [a.text for a in again.answers] == [a.text for a in concise.answers]


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [("", "empty"), (" \n", "empty"), ("x" * 3000, "too long: 30"), ("x" * 10**6, "too long: 1,0")],
)
def test_prompts_that_cannot_be_answered(tiny_engine, prompt, sentence):
    with pytest.raises(BapoError, match=sentence):
        last_frame(tiny_engine, prompt)


def test_answers_that_would_be_too_long(tiny_engine, settings):
    with pytest.raises(BapoError, match="600 tokens is too long: at most 512"):
        last_frame(tiny_engine, sampling=Sampling(max_new_tokens=600))
    tiny_engine.base.model.config.max_position_embeddings = 64
    with pytest.raises(BapoError, match="at most 52 tokens fit"):
        last_frame(tiny_engine, "x" * 60)


def test_the_second_visitor_is_told_to_wait_and_gets_its_own_text(tiny_engine):
    alone = {prompt: last_frame(tiny_engine, prompt).answers[2].text for prompt in ("one", "two")}
    first = compare(tiny_engine, "one", "P2A", SHORT)
    next(first)  # holds the model
    seen: list[Frame] = []
    second = threading.Thread(target=lambda: seen.extend(compare(tiny_engine, "two", "P2A", SHORT)))
    second.start()
    while not seen:
        second.join(0.05)
    assert (seen[0].ahead, seen[0].answers) == (1, ())
    rest = list(first)
    second.join(60)
    assert rest[-1].answers[2].text == alone["one"]
    assert seen[-1].answers[2].text == alone["two"]


def test_a_short_answer_does_not_wait_for_a_long_one(tiny_engine):
    tiny_engine.base.stop_ids = frozenset()
    long, short = Sampling(max_new_tokens=200), Sampling(max_new_tokens=12)
    alone = last_frame(tiny_engine, "two", sampling=short)
    told: list[Frame] = []
    first = threading.Thread(target=lambda: told.extend(compare(tiny_engine, "one", "P2A", long)))
    first.start()
    while not any(frame.answers for frame in told):
        first.join(0.01)
    answered = last_frame(tiny_engine, "two", sampling=short)
    assert first.is_alive() and not told[-1].done
    # Turns of 8 tokens: the long answer had the one it was in and one before each of the short one's two.
    assert told[-1].answers[0].tokens < 60
    first.join(60)
    assert [answer.text for answer in answered.answers] == [answer.text for answer in alone.answers]
    assert told[-1].answers[0].tokens == 200


def test_a_visitor_who_leaves_gives_the_model_up(tiny_engine):
    stream = compare(tiny_engine, "one", "P2A", Sampling(max_new_tokens=200))
    next(stream)
    with tiny_engine.turns.ticket() as ticket:
        assert ticket.ahead == 1
        stream.close()
        assert ticket.wait(0)


def test_turns_are_taken_in_order():
    turns = Turns()
    with turns.ticket() as first:
        with turns.ticket() as second, turns.ticket() as third:
            assert [ticket.ahead for ticket in (first, second, third)] == [0, 1, 2]
            assert first.wait(0)
            assert not second.wait(0)
        assert first.wait(0)
        assert not first.pass_on(), "nobody waits"
        with turns.ticket() as second, turns.ticket() as third:
            assert first.pass_on()
            assert [ticket.ahead for ticket in (second, third, first)] == [0, 1, 2]
            assert second.wait(0) and not first.wait(0)
        assert first.wait(0)
    with turns.ticket() as next_one:
        assert next_one.wait(0)


def test_scores_equal_plain_peft(tiny_engine, tiny_folders, architecture, settings):
    pairs = [Pair("p", "good", "bad"), Pair("p", "good", "worse"), Pair("q", "fine", "so so")]
    result = score_pairs(tiny_engine, pairs, "literature")
    base = load_base(replace(settings, base=str(tiny_folders[architecture])))
    policy = PeftModel.from_pretrained(base.model, tiny_engine.store.folder / "literature-dpo").eval()
    for pair, scored in zip(pairs, result["pairs"], strict=True):
        prompt = base.encode_prompt(pair.prompt)
        responses = [base.encode_response(pair.prompt, text) for text in (pair.chosen, pair.rejected)]
        with policy.disable_adapter():
            under_base = logps_apart(policy, prompt, responses).tolist()
        under_dpo = logps_apart(policy, prompt, responses).tolist()
        for i, role in enumerate(("chosen", "rejected")):
            assert scored[role]["base"] == pytest.approx(under_base[i], abs=1e-3)
            assert scored[role]["dpo"] == pytest.approx(under_dpo[i], abs=1e-3)
        assert set(scored["base_response"]) == {"base", "dpo", "bapo"}
    drifts = {s["prompt"]: s["base_response"]["base"] - s["base_response"]["dpo"] for s in result["pairs"]}
    assert result["drift"]["dpo"]["nats"] == pytest.approx(sum(drifts.values()) / 2)
    assert set(result["reward_accuracy"]) == {"dpo", "bapo"}
