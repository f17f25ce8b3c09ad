"""What the page says, and that nothing a model or a visitor wrote becomes markup."""

import re

import pytest

from bapo.comparison import Answer, BaseToken, Frame
from bapo.ui import texts

HOSTILE = "<script>alert(1)</script>\n\"'&"


def frame(dpo=-3.0, bapo=0.5, done=True):
    tokens = (BaseToken("A", {"base": 0.0, "dpo": dpo, "bapo": bapo}),)
    answers = (Answer("base", "A", 1, -1.0, 2.0, done), Answer("dpo", "B", 3, -1.0, 2.0, done), Answer("bapo", "C", 1))
    return Frame("P2A", "tiny", answers, tokens, seconds=2.0, done=done)


@pytest.mark.parametrize(
    ("dpo", "bapo", "sentence"),
    [
        (-18.2, 0.4, "DPO drifted 18.2 nats: the base's answer became e¹⁸ times less likely; "
                     "BAPO drifted −0.4 nats: the base's answer is as likely as it was."),
        (-1.2, 2.6, "DPO drifted 1.2 nats: the base's answer became e times less likely; "
                    "BAPO drifted −2.6 nats: the base's answer became e³ times more likely."),
    ],
)  # fmt: skip
def test_the_reading_of_the_chart(dpo, bapo, sentence):
    assert re.sub("<.*?>", "", texts.reading(frame(dpo, bapo))) == sentence
    assert texts.reading(None) == ""


def test_panels_count_tokens_and_say_the_drift():
    panel = texts.answer_panel("dpo", frame().answers[1], frame())
    assert "3 tokens · 1.5 tokens/s · drift +3.0 nats" in panel
    assert "drift" not in texts.answer_panel("base", frame().answers[0], frame())
    assert "bapo-writing" not in panel
    assert "bapo-writing" in texts.answer_panel("dpo", frame(done=False).answers[1], frame(done=False))


def test_nothing_becomes_markup():
    hostile = Answer("base", HOSTILE, 1, -1.0, 1.0)
    tokens = (BaseToken(HOSTILE, {"base": 0.0, "dpo": -1.0}),)
    hostile_frame = Frame("P2A", "tiny", frame().answers, tokens, done=True)
    for html in (
        texts.answer_panel("base", hostile, frame()),
        texts.token_strip(hostile_frame, "dpo"),
        texts.notice(HOSTILE, "alert"),
        texts.description(HOSTILE),
    ):
        assert "<script" not in html
        assert "&lt;script&gt;" in html


def test_every_token_carries_its_change_as_a_number():
    tokens = (
        BaseToken("Leaves", {"base": -1.0, "dpo": -2.25}),
        BaseToken("", {"base": -1.0, "dpo": -1.5}),  # the first half of a character
        BaseToken("é", {"base": -1.0, "dpo": -1.25}),
        BaseToken(" fall\n", {"base": -1.0, "dpo": -0.5}),
        BaseToken("", {"base": -0.1, "dpo": -0.1}),  # end of turn
    )
    strip = texts.token_strip(Frame("P2A", "tiny", frame().answers, tokens, done=True), "dpo")
    assert re.findall(r'title="(.*?)"', strip) == [
        "−1.25 nats under DPO", "−0.75 nats under DPO", "+0.50 nats under DPO", "0.00 nats under DPO",
    ]  # fmt: skip
    assert re.findall("<small>(.*?)</small>", strip) == ["−1.2", "−0.8", "+0.5", ""]
    assert ">end<" in strip
    assert strip.count("bapo-break") == 1
    assert ">end<" not in texts.token_strip(Frame("P2A", "tiny", frame().answers, tokens), "dpo"), "it goes on"
    assert texts.token_strip(Frame("P2A", "tiny", (Answer("base"),), tokens), "dpo") == ""


def test_a_missing_adapter_is_said_in_its_column():
    alone = Frame("P2A", "tiny", (Answer("base", "A", 1),), (), done=True)
    assert "no DPO adapter" in texts.answer_panel("dpo", None, alone)
    assert "no DPO adapter" not in texts.answer_panel("dpo", None, None)


def test_waiting_says_how_many_are_ahead():
    assert "one question is being answered before yours" in texts.status(Frame("P2A", "tiny", ahead=1))
    assert "2 questions are" in texts.status(Frame("P2A", "tiny", ahead=2))
    assert "5 tokens in 2.0 s, 2.5 tokens/s" in texts.status(frame())


def test_the_command_can_be_pasted():
    import shlex

    command = texts.terminal_command("it's <b>", "P2A", 64, 0.5, 0.9, 3)
    given = "--preference P2A --max-new-tokens 64 --temperature 0.5 --top-p 0.9 --seed 3"
    assert shlex.split(command)[3:] == ["compare", "it's <b>", *given.split()]
