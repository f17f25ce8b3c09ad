"""The Compare page in a real browser: once on the real base, the corners on a tiny one."""

import re
from itertools import pairwise

import psutil
import pytest
from playwright.sync_api import Page, expect

NAMES = ("base", "dpo", "bapo")
LONGEST = 2048  # tokens, as the tiny app is set up
# Collects every text that the columns show; looking from outside, once in a while, would miss most of them.
WATCH = """names => {
    const texts = () => names.map(name => document.querySelector(`#answer-${name} .bapo-text`)?.innerText ?? "");
    window.shown = [];
    new MutationObserver(() => window.shown.push(texts()))
        .observe(document.body, {subtree: true, childList: true, characterData: true});
}"""


def open_page(page: Page, address: str) -> None:
    page.goto(address)
    expect(page.locator("#prompt textarea")).to_be_visible()
    # Buttons come in a script of their own, which a busy machine may run after the prompt has appeared.
    expect(page.locator("#ask")).to_be_visible()


def ask(page: Page, prompt: str) -> None:
    page.fill("#prompt textarea", prompt)
    page.press("#prompt textarea", "Enter")


def answer(page: Page, name: str):
    return page.locator(f"#answer-{name} .bapo-text")


def choose_length(page: Page, tokens: int) -> None:
    number = page.get_by_label("number input for Length")
    if not number.is_visible():
        page.get_by_text("Length, temperature, seed").click()
    # What is typed while the page still comes to life is overwritten by its first values.
    slider = page.get_by_label("range slider for Length")
    for _ in range(10):
        number.fill(str(tokens))
        number.press("Tab")
        page.wait_for_timeout(300)
        if slider.input_value() == str(tokens):
            return
    expect(slider).to_have_value(str(tokens))


def state(page: Page):
    return page.locator("#state")


def test_three_answers_stream_and_the_drift_is_drawn(page, real_app):
    open_page(page, real_app)
    expect(state(page)).to_contain_text("A recorded run of this very model")
    for name in NAMES:
        assert len(answer(page, name).inner_text()) > 40, "the first screen makes the argument without a click"
    choose_length(page, 24)
    page.evaluate(WATCH, NAMES)
    ask(page, "What is a rainbow?")
    expect(state(page)).to_contain_text(re.compile(r"72 tokens in .* s, .* tokens/s"), timeout=120_000)
    for name, shown in zip(NAMES, zip(*page.evaluate("shown"), strict=True), strict=True):
        texts = [text.rstrip("…▌") for text in shown]
        growing = texts[len(texts) - texts[::-1].index("") :]  # what was shown since the column was last empty
        assert all(later.startswith(earlier) for earlier, later in pairwise(growing)), "an answer only grows"
        assert len(set(growing)) > 2
        assert growing[-1] == answer(page, name).inner_text()
    assert len({answer(page, name).inner_text() for name in NAMES}) == 3
    expect(page.locator("#chart .scatterlayer .trace")).to_have_count(2)
    expect(page.locator("#reading")).to_contain_text(re.compile(r"DPO drifted .* nats: .*; BAPO drifted .* nats: .*\."))
    under_dpo = page.locator("#tokens").inner_text()
    page.locator("#method").get_by_label("BAPO", exact=True).check()
    expect(page.locator("#tokens .bapo-token").first).to_have_attribute("title", re.compile("nats under BAPO"))
    assert page.locator("#tokens").inner_text() != under_dpo


def test_stop_change_the_preference_ask_again_reload(page, tiny_app):
    open_page(page, tiny_app)
    choose_length(page, 512)
    ask(page, "why?")
    expect(page.locator("#answer-bapo footer")).to_contain_text("tokens/s")
    page.click("#stop")
    expect(state(page)).to_contain_text(re.compile(r"Stopped after \d+ tokens"))
    expect(page.locator("#ask")).to_be_enabled()
    expect(page.locator("#stop")).to_be_disabled()
    stopped = answer(page, "dpo").inner_text()
    page.wait_for_timeout(1500)
    assert answer(page, "dpo").inner_text() == stopped

    page.locator("#preference").get_by_label("Literature").check()
    expect(page.locator("#about")).to_contain_text("lyrical prose")
    choose_length(page, 8)
    page.click("#ask")
    expect(state(page)).to_contain_text("24 tokens in")
    assert not answer(page, "dpo").inner_text().startswith(stopped[:20])
    page.reload()
    expect(page.locator("#prompt textarea")).to_be_visible()
    expect(page.locator("#ask")).to_be_enabled()
    expect(state(page)).to_contain_text("Ask a question")


def test_two_tabs_at_once_get_their_own_text_and_the_short_answer_does_not_wait(browser, page, tiny_app):
    open_page(page, tiny_app)
    second = browser.new_context().new_page()
    open_page(second, tiny_app)
    choose_length(page, LONGEST)
    choose_length(second, 16)
    ask(page, "first?")
    expect(page.locator("#answer-base footer")).to_contain_text("tokens/s")
    ask(second, "second?")
    expect(state(second)).to_contain_text("48 tokens in")
    expect(state(page)).to_contain_text("Answering")
    assert answer(page, "base").inner_text()[:16] != answer(second, "base").inner_text()[:16]
    page.click("#stop")
    expect(state(page)).to_contain_text("Stopped after")
    second.context.close()


def test_closed_tabs_give_the_model_up(browser, page, tiny_app):
    leaving = [browser.new_context().new_page() for _ in range(3)]
    for tab in [*leaving, page]:
        open_page(tab, tiny_app)
        choose_length(tab, 8 if tab is page else LONGEST)
    for tab in leaving:
        ask(tab, "first?")
        expect(tab.locator("#answer-base footer")).to_contain_text("tokens/s")
    assert load(tiny_app) > 50
    for tab in leaving:
        tab.context.close()
    for _ in range(20):  # the three long answers take a minute and more
        if load(tiny_app) < 20:
            break
    else:
        pytest.fail("the app still answers those who have left")
    ask(page, "second?")
    expect(state(page)).to_contain_text("24 tokens in")


def load(url: str) -> float:
    """Per cent of a core that the process behind an address takes during a second."""
    port = int(url.rsplit(":", 1)[1])
    listening = (each for each in psutil.net_connections("tcp") if each.status == "LISTEN" and each.laddr.port == port)
    return psutil.Process(next(listening).pid).cpu_percent(1.0)


@pytest.mark.parametrize(
    "prompt",
    ["<img src=x onerror=alert(1)><b>bold</b>", "${1+1} {{value}} `x`", "为什么天空是蓝色的？", "لماذا السماء زرقاء؟"],
)
def test_any_prompt_is_shown_safely(page, tiny_app, prompt):
    page.on("dialog", lambda dialog: pytest.fail("a prompt became script"))
    open_page(page, tiny_app)
    choose_length(page, 8)
    ask(page, prompt)
    expect(state(page)).to_contain_text("24 tokens in")
    assert page.locator("#prompt textarea").input_value() == prompt
    assert page.locator(".gradio-container img[src=x], #answer-base b").count() == 0


@pytest.mark.parametrize(("prompt", "sentence"), [("", "prompt is empty"), ("word " * 3000, "too long")])
def test_a_prompt_that_cannot_be_answered_is_told_so_in_place(page, tiny_app, prompt, sentence):
    open_page(page, tiny_app)
    page.fill("#prompt textarea", prompt)
    page.click("#ask")
    expect(page.locator("#state [role=alert]")).to_contain_text(sentence)
    expect(page.locator("#ask")).to_be_enabled()


def test_a_preference_with_one_method_has_one_line(page, tiny_app):
    open_page(page, tiny_app)
    page.locator("#preference").get_by_label("Business").check()
    choose_length(page, 8)
    ask(page, "why?")
    expect(state(page)).to_contain_text("16 tokens in")
    expect(page.locator("#chart .scatterlayer .trace")).to_have_count(1)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_scrolls_one_way_only(browser, tiny_app, scheme):
    context = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme=scheme)
    page = context.new_page()
    open_page(page, tiny_app)
    choose_length(page, 8)
    ask(page, "why?")
    expect(state(page)).to_contain_text("24 tokens in")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    boxes = [page.locator(f"#answer-{name}").bounding_box() for name in NAMES]
    assert boxes[0]["y"] < boxes[1]["y"] < boxes[2]["y"], "columns stack"
    context.close()


def test_the_keyboard_reaches_everything(page, tiny_app):
    open_page(page, tiny_app)
    expect(page.locator("#prompt textarea")).to_be_focused()
    page.keyboard.type("why?")
    expect(page.locator("#prompt textarea")).to_have_value("why?")
    reached = []
    for _ in range(16):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate("(e => e.innerText || e.getAttribute('type') || e.tagName)(document.activeElement)")
        )
    assert "Ask" in reached
    assert "radio" in reached
