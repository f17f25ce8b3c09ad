"""The Train tab's sentences and curves from plain data; what users wrote is escaped."""

from types import SimpleNamespace

import pytest

from bapo.errors import BapoError
from bapo.jobs.service import owner_of
from bapo.jobs.store import Curves, Job, JobProgress, JobRequest
from bapo.pair_files import Problem
from bapo.pairs import Pair, PairsReport
from bapo.training.plan import TrainingPlan
from bapo.training.preview import Estimate, Lengths, Preview
from bapo.ui import train_texts
from bapo.ui.train_charts import CHARTS, training_figure
from bapo.ui.visitors import Visitors

EVIL = "<img src=x onerror=alert(1)>"
PLANS = tuple(TrainingPlan(preference="mine", method=method) for method in ("dpo", "bapo"))
REQUEST = JobRequest(name="mine", plans=PLANS, base="tiny", base_fingerprint="f", pairs=12, prompts=6)


def job(state, **changes):
    values = {
        "id": "a" * 16, "owner": "o", "state": state, "request": REQUEST, "progress": JobProgress(), "error": "",
        "attempts": 0, "created": 0.0, "started": 10.0, "ended": 100.0,
    }  # fmt: skip
    return Job(**{**values, **changes})


def test_a_report_names_row_column_and_what_was_expected():
    problems = [Problem(4, None, "expected a JSON object"), Problem(7, EVIL, f"is {EVIL}")]
    html = train_texts.report(PairsReport(EVIL, [Pair("p", "a", "b")], problems, ["A note."], rows=3))
    assert "<b>1 pairs</b> of 1 prompts in 3 rows" in html
    assert "2 rows cannot be used" in html
    assert "<td>4</td><td></td><td>expected a JSON object</td>" in html
    assert "A note." in html
    assert "<img" not in html
    many = PairsReport("f", [], [Problem(i, None, "x") for i in range(60)])
    assert "and 10 more" in train_texts.report(many)


def test_lengths_and_first_rows():
    shown = Preview({"prompt": Lengths(9, 12, 30)}, 2, [("<|user|>" + EVIL, "a" * 2000, "b")])
    html = train_texts.lengths(shown, 512)
    assert "<td>prompt</td><td>9</td><td>12</td><td>30</td>" in html
    assert "2 responses are longer than 512 tokens" in html
    assert "<img" not in html
    assert "a" * 1200 + " …" in html


@pytest.mark.parametrize(
    ("one", "sentence"),
    [
        (job("queued", place=3, started=None), "Waiting: place 3 in the queue."),
        (job("queued", place=1), "It goes on from its last checkpoint."),
        (job("running"), "starting its process"),
        (
            job("running", progress=JobProgress(1, "bapo", "training", 5, 20, 30.0)),
            "BAPO · 2 of 2: training 5 of 20 · 30 s left in this phase",
        ),
        (job("finished"), "Finished after 90 s."),
        (job("cancelled"), "Cancelled."),
        (job("failed", error=f"The disk is full. {EVIL}"), "Failed. The disk is full. &lt;img"),
    ],
)
def test_where_a_job_stands(one, sentence):
    html = train_texts.job_panel(one).replace("90 s", "90 s").replace("2 min", "90 s")
    assert sentence in html
    assert f'data-state="{one.state}"' in html


def test_answers_beside_each_other_the_latest_of_each():
    curves = Curves(answers={EVIL: {"base": [(0, "b")], "dpo": [(2, "old"), (4, EVIL)]}})
    html = train_texts.answers(curves)
    assert html.count("<section") == 2
    assert "step 4" in html
    assert "old" not in html
    assert "<img" not in html


def test_durations_and_estimates():
    assert [train_texts.duration(s) for s in (5, 89.4, 120, 3600, 9000)] == ["5 s", "89 s", "2 min", "60 min", "2.5 h"]
    assert "About 2 min and 1.5 GB of memory here, 7 steps." in train_texts.estimated(Estimate(120, 1.5e9, 7))


def test_the_fork_shares_its_axes():
    points = {
        "dpo": {"training": [(1, {"logps_change/base": 0.0}), (2, {"logps_change/base": -3.0})]},
        "bapo": {
            "training": [(1, {"logps_change/base": 0.0}), (2, {"logps_change/base": 0.5})],
            "held out": [(2, {"logps_change/base": 0.25})],
        },
    }
    figure = training_figure(CHARTS[0], points)
    lines = {trace.name: (list(trace.x), list(trace.y)) for trace in figure.data}
    assert lines == {
        "DPO base response": ([1, 2], [0.0, -3.0]),
        "BAPO base response": ([1, 2], [0.0, 0.5]),
        "BAPO base response (held out)": ([2], [0.25]),
    }
    colours = {trace.name: trace.line.color for trace in figure.data}
    assert colours["BAPO base response"] == colours["BAPO base response (held out)"] != colours["DPO base response"]
    assert list(training_figure(CHARTS[1], points).data) == [], "a chart without its metrics stays empty"


def visitors(sign_in=""):
    return Visitors(SimpleNamespace(settings=SimpleNamespace(sign_in=sign_in)))


def test_visitors_are_told_apart_by_token_or_name():
    plain, token = visitors(), Visitors.new_token()
    assert plain.owner(token, None) == owner_of(f"token {token}")
    for wrong in ("", None, "short", "a b" * 20, "x" * 65):
        with pytest.raises(BapoError, match="Reload"):
            plain.owner(wrong, None)
    named = SimpleNamespace(username="ann")
    assert plain.owner(token, named) == plain.owner(token, None), "no name counts where nobody signs in"
    assert visitors("ann:secret").owner("", named) == owner_of("user ann")
    with pytest.raises(BapoError, match="Sign in first"):
        visitors("ann:secret").owner(token, None)
    session = {"oauth_info": {"userinfo": {"preferred_username": "ann"}}}
    hub = SimpleNamespace(request=SimpleNamespace(scope={"session": session}))
    assert visitors("huggingface").owner("", hub) == owner_of("user ann")
    with pytest.raises(BapoError, match="Sign in first"):
        visitors("huggingface").owner(token, SimpleNamespace(request=SimpleNamespace(scope={})))
