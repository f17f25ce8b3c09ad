"""The Train tab in a real browser: from a file with faults to three answers, through a reload and a cancellation.

`BAPO_TEST_TRAIN_BASE=smollm2-135m` runs it on the embedded base, as .ci/run does; without, on a tiny one.
"""

import json
import os

import pytest
from playwright.sync_api import Page, expect

from tests.ui.conftest import serve

REAL = os.environ.get("BAPO_TEST_TRAIN_BASE")
EPOCHS = "2" if REAL else "30"  # enough steps to reload and to cancel in their midst
QUESTIONS = [
    "cat", "dog", "bird", "fish", "cow", "hen", "pig", "goat", "bee", "ant", "fox", "owl",
    "sun", "moon", "sea", "tree", "rose", "car", "bus", "ship", "tea", "milk", "cake", "egg",
]  # fmt: skip


@pytest.fixture(scope="module")
def train_app(tiny_folders, tmp_path_factory):
    folder = tmp_path_factory.mktemp("train-app")
    environment = {"BAPO_DATA": str(folder / "data"), "BAPO_ADAPTERS": str(folder / "adapters")}
    if REAL:
        yield from serve(BAPO_BASE=REAL, **environment)
    else:
        base, cache = str(tiny_folders["llama"]), str(folder / "cache")
        yield from serve(BAPO_BASE=base, BAPO_CACHE=cache, OMP_NUM_THREADS="1", **environment)


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory):
    """24 short pairs and three faulty rows."""
    rows = [
        json.dumps({"prompt": f"What is a {word}?", "chosen": f"A {word}, what else!", "rejected": f"It is a {word}."})
        for word in QUESTIONS
    ]
    rows[3:3] = ["{broken", json.dumps({"prompt": "p", "chosen": "a"})]
    rows.append(json.dumps({"prompt": "p", "chosen": " ", "rejected": "b"}))
    file = tmp_path_factory.mktemp("upload") / "my pairs.jsonl"
    file.write_text("\n".join(rows))
    return file


def open_train(page: Page, address: str) -> None:
    page.goto(address)
    page.get_by_role("tab", name="Train").click()
    expect(page.locator("#train")).to_be_visible()


def state(page: Page):
    return page.locator("#job [data-state]")


def points(page: Page) -> int:
    """How many training steps the first chart shows."""
    script = (
        "() => { const plot = document.querySelector('#curves .js-plotly-plot');"
        " return plot && plot.data ? Math.max(0, ...plot.data.map(line => line.x.length)) : 0; }"
    )
    return page.evaluate(script)


def wait_for_points(page: Page, more_than: int) -> int:
    for _ in range(240):  # two minutes
        if points(page) > more_than:
            return points(page)
        page.wait_for_timeout(500)
    raise AssertionError(f"the curves stayed at {points(page)} steps")


def test_from_a_file_with_faults_to_three_answers(page, train_app, pairs_file):
    open_train(page, train_app)
    page.locator("#pairs-file input[type=file]").set_input_files(pairs_file)
    report = page.locator("#pairs-report")
    expect(report).to_contain_text("24 pairs of 24 prompts in 27 rows")
    expect(report).to_contain_text("3 rows cannot be used")
    rows = report.locator("tbody tr")
    assert rows.all_inner_texts() == [
        '4\t\texpected a JSON object such as {"prompt": …}',
        "5\trejected\tis missing",
        "27\tchosen\tis empty",
    ]
    expect(page.locator("#train")).to_be_disabled()
    page.locator("#leave-out input").check()
    expect(page.locator("#train")).to_be_enabled()
    expect(page.locator("#estimate")).to_contain_text("3 steps")

    page.locator("#taste-name textarea, #taste-name input").first.fill("what-else")
    page.get_by_label("Both in turn, to compare").check()
    expect(page.locator("#estimate")).to_contain_text("6 steps")
    page.locator("#advanced").get_by_text("Advanced").click()
    page.get_by_label("Epochs").fill(EPOCHS)
    page.get_by_label("Probe prompt 1").fill("What is a cup?")
    page.locator("#train").click()
    expect(page.locator("#train-message")).to_contain_text("You may close this page")

    first = wait_for_points(page, 0)
    wait_for_points(page, first)
    page.reload()
    page.get_by_role("tab", name="Train").click()
    expect(page.locator("#job")).to_contain_text("what-else")
    reached = wait_for_points(page, first)

    page.locator("#cancel-job").click()
    expect(state(page)).to_have_attribute("data-state", "cancelled")
    page.wait_for_timeout(3000)
    page.locator("#resume-job").click()
    expect(state(page)).to_have_attribute("data-state", "running")
    expect(state(page)).to_have_attribute("data-state", "finished", timeout=600_000)
    assert wait_for_points(page, reached - 1) >= reached
    expect(page.locator("#probe-answers")).to_contain_text("What is a cup?")
    expect(page.locator("#probe-answers section")).to_have_count(3)

    page.locator("#compare-now").click()
    expect(page.locator("#preference")).to_be_visible()
    expect(page.get_by_label("what-else", exact=True)).to_be_checked()
    page.locator("#prompt textarea").fill("What is a hat?")
    page.locator("#ask").click()
    for name in ("base", "dpo", "bapo"):
        expect(page.locator(f"#answer-{name} footer")).to_contain_text("tokens")
    expect(page.locator("#state")).to_contain_text("tokens/s over all answers")

    page.get_by_role("tab", name="Adapters").click()
    cards = page.locator("#adapter-cards tbody tr", has_text="what-else")
    expect(cards).to_have_count(2)


@pytest.mark.skipif(bool(REAL), reason="one run on the real base is enough")
class TestOtherVisitors:
    """What another browser sees of the job above."""

    def test_nothing_of_it(self, browser, train_app, pairs_file):
        other = browser.new_context().new_page()
        open_train(other, train_app)
        expect(other.locator("#job")).to_contain_text("No job yet")
        other.get_by_role("tab", name="Adapters").click()
        expect(other.locator("#adapter-cards")).to_contain_text("No adapter fits")
        other.context.close()


@pytest.mark.skipif(bool(REAL), reason="one run on the real base is enough")
def test_columns_with_other_names_are_asked_for(page, train_app, tmp_path):
    file = tmp_path / "odd.csv"
    file.write_text("asked,winner,loser\nWhy?,Because.,No.\nHow?,So.,Not so.\n")
    open_train(page, train_app)
    page.locator("#pairs-file input[type=file]").set_input_files(file)
    expect(page.locator("#pairs-report")).to_contain_text("Which columns hold")
    expect(page.locator("#mapper")).to_be_visible()
    page.locator("#mapper").get_by_role("button", name="Read it so").click()
    expect(page.locator("#pairs-report")).to_contain_text("2 pairs of 2 prompts")
    expect(page.locator("#train")).to_be_enabled()


@pytest.mark.skipif(bool(REAL), reason="one run on the real base is enough")
def test_a_file_that_cannot_be_read_is_a_sentence(page, train_app, tmp_path):
    file = tmp_path / "bad.parquet"
    file.write_bytes(b"PAR1 <img src=x onerror=alert(1)> PAR1")
    open_train(page, train_app)
    page.locator("#pairs-file input[type=file]").set_input_files(file)
    expect(page.locator("#pairs-report [role=alert]")).to_contain_text("bad.parquet is a damaged Parquet")
    expect(page.locator("#train")).to_be_disabled()
