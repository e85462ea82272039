"""The page in a headless browser, against the real server."""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page, Route, expect, sync_playwright

from magistral_mlx.server.safety import Rules
from tests.scripted import scripted
from tests.serving import HUB_ID, QUESTION, Running, until

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), "")
MAC = Path("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")
BROWSER = BROWSER or (str(MAC) if MAC.exists() else "")
QUIET = ["--disable-gpu", "--disable-quic", "--no-first-run"]
QUIET += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
ROOT = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []

expect.set_options(timeout=15_000)

pytestmark = pytest.mark.skipif(not BROWSER, reason="no Chromium here")

LONG = "<think>\n" + "Let me go on and on about this.\n" * 200 + "</think>\nSo it is 85."


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=QUIET + ROOT)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., Page]]:
    """A page that must not send requests elsewhere or log errors."""
    contexts, wrong, asked = [], [], []

    def visited(address: str, **how) -> Page:
        contexts.append(browser.new_context(**({"viewport": {"width": 1000, "height": 700}} | how)))
        page = contexts[-1].new_page()
        page.set_default_timeout(15_000)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda said: wrong.append(said.text) if "Content Security" in said.text else None)
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        return page

    yield visited
    for context in contexts:
        context.close()
    assert wrong == []
    homes = {"/".join(url.split("/")[:3]) for url in asked}
    assert all(home.startswith("http://127.0.0.1:") for home in homes), homes


def ask(page: Page, text: str) -> Locator:
    """Send a message; returns the element of its reply."""
    at = page.locator("#turns > li").count()
    page.fill("#question", text)
    page.press("#question", "Enter")
    return page.locator("#turns > li").nth(at + 1)


def written(reply: Locator) -> Locator:
    expect(reply).to_have_attribute("data-phase", "done")
    return reply


def test_a_question_is_answered_kept_and_forgotten(visit, served):
    page = visit(served.url)
    expect(page.locator("#question")).to_be_focused()
    expect(page.locator("#model")).to_have_text(HUB_ID.partition("/")[2])
    reply = written(ask(page, QUESTION))
    expect(reply.locator(".text")).to_contain_text("7")
    expect(reply.locator("summary")).to_contain_text("Thought for")
    expect(reply.locator("summary")).to_contain_text("tokens")
    expect(reply.locator(".reasoning")).to_be_hidden()
    reply.locator("summary").click()
    expect(reply.locator(".reasoning")).to_contain_text("3")
    page.reload()
    expect(page.locator(".assistant .text")).to_contain_text("7")
    page.locator("#new").click()
    expect(page.locator("#turns > li")).to_have_count(0)
    expect(page.locator("#welcome")).to_be_visible()
    page.reload()
    expect(page.locator("#turns > li")).to_have_count(0)
    page.get_by_role("button", name="Back to the last chat").click()
    expect(page.locator(".assistant .text")).to_contain_text("7")
    expect(page.locator("#welcome")).to_be_hidden()
    page.reload()
    expect(page.locator("#turns > li")).to_have_count(2)
    page.locator("#new").click()
    page.get_by_role("button", name="Forget it").click()
    expect(page.locator("#before")).to_be_hidden()
    page.reload()
    expect(page.locator("#before")).to_be_hidden()
    assert QUESTION not in page.evaluate("JSON.stringify({...localStorage})")


def test_a_screen_reader_knows_who_speaks(visit, served):
    page = visit(served.url)
    written(ask(page, QUESTION))
    expect(page.get_by_role("log", name="Conversation").get_by_role("list")).to_match_aria_snapshot("""
        - list:
          - listitem:
            - heading "You said" [level=2]
            - text: What is 3 + 4?
            - button "Copy"
            - button "Edit"
          - listitem:
            - heading "Magistral said" [level=2]
            - group: /Thought for .*/
            - paragraph
            - button "Copy"
            - button "Answer again"
    """)
    page.locator("#open-settings").click()
    dialog = page.get_by_role("dialog", name="Settings")
    for name in ("Thinking limit tokens", "Reply limit tokens", "Temperature", "Top p", "Seed"):
        expect(dialog.get_by_role("spinbutton", name=name, exact=True)).to_be_visible()


def test_settings_are_kept_and_sent(visit, served):
    page = visit(served.url)
    bodies = []
    page.on("request", lambda request: bodies.append(request.post_data_json) if request.post_data else None)
    page.locator("#open-settings").click()
    values = {"think_budget": 30, "max_tokens": 60, "temperature": 0.5, "top_p": 0.9, "seed": 7}
    for name, value in values.items():
        page.fill(f"#settings [name={name}]", str(value))
    page.fill("#settings [name=system]", "Be brief.")
    page.press("#settings [name=seed]", "Escape")
    page.reload()
    first = written(ask(page, QUESTION)).locator(".text").text_content()
    assert {name: bodies[0][name] for name in values} == values
    assert bodies[0]["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": QUESTION},
    ]
    page.locator(".assistant .actions [data-do=again]").click()
    assert written(page.locator(".assistant")).locator(".text").text_content() == first
    assert bodies[1] == bodies[0]
    page.locator("#open-settings").click()
    page.locator("#settings [name=think]").uncheck()
    page.locator("#defaults").wait_for()
    page.keyboard.press("Escape")
    reply = written(ask(page, "12 + 5"))
    expect(reply.locator(".thinking")).to_be_hidden()
    assert bodies[2]["reasoning_effort"] == "none"
    assert [message["role"] for message in bodies[2]["messages"]] == ["system", "user", "assistant", "user"]


def test_a_message_is_edited(visit, served):
    page = visit(served.url)
    written(ask(page, "12 + 5"))
    written(ask(page, "6 + 6"))
    page.locator(".user").first.hover()
    page.locator(".user [data-do=edit]").first.click()
    expect(page.locator("#question")).to_have_value("12 + 5")
    page.keyboard.press("Escape")
    expect(page.locator("#question")).to_have_value("")
    page.locator(".user [data-do=edit]").first.click()
    page.fill("#question", QUESTION)
    page.press("#question", "Enter")
    expect(page.locator("#turns > li")).to_have_count(2)
    expect(written(page.locator(".assistant")).locator(".text")).to_contain_text("7")


def test_keys(visit, served):
    page = visit(served.url)
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    expect(page.locator("#question")).to_have_value("one\ntwo")
    page.fill("#question", "  ")
    page.keyboard.press("Enter")
    expect(page.locator("#turns > li")).to_have_count(0)
    page.fill("#question", "한국")
    page.locator("#question").dispatch_event("keydown", {"key": "Enter", "isComposing": True})
    expect(page.locator("#turns > li")).to_have_count(0)


@pytest.fixture(scope="module")
def slow(tiny_tokenizer) -> Iterator[Running]:
    with scripted(tiny_tokenizer("v11"), LONG, step_seconds=0.02) as model, Running(model) as server:
        yield server


def test_thinking_is_seen_and_ended(visit, slow):
    page = visit(slow.url)
    reply = ask(page, QUESTION)
    expect(reply).to_have_attribute("data-phase", "thinking")
    expect(reply).to_have_attribute("aria-busy", "true")
    expect(reply.locator(".reasoning")).to_be_visible()
    expect(reply.locator("summary")).to_contain_text("Thinking")
    expect(page.locator("#send")).to_be_hidden()
    reply.locator(".answer-now").click()
    expect(reply.locator("summary")).to_be_focused()  # focus is not lost with the button
    expect(reply).to_have_attribute(
        "data-phase", "answering"
    )  # the scripted model writes the rest as its answer
    expect(reply.locator(".reasoning")).to_be_hidden()
    expect(reply.locator("summary")).to_contain_text("Thought for")
    expect(reply.locator(".text")).to_contain_text("on and on")
    page.keyboard.press("Escape")
    expect(written(reply)).to_have_attribute("aria-busy", "false")


@pytest.mark.parametrize("how", ["Escape", "button"])
def test_stopping_stops_the_server_too(visit, slow, how):
    page = visit(slow.url)
    reply = ask(page, QUESTION)
    expect(reply).to_have_attribute("data-phase", "thinking")
    assert not slow.idle
    if how == "button":
        page.locator("#stop").click()
    else:
        page.keyboard.press("Escape")
    expect(written(reply).locator(".figures")).to_have_text("Stopped.")
    expect(page.locator("#question")).to_be_focused()
    until(lambda: slow.idle)


def test_a_reload_keeps_what_was_written(visit, slow):
    page = visit(slow.url)
    expect(ask(page, QUESTION).locator(".reasoning")).to_contain_text("on and on")
    page.reload()
    expect(page.locator(".problem")).to_contain_text("The page was left before the answer was whole.")
    page.locator("summary").click()
    expect(page.locator(".reasoning")).to_contain_text("on and on")


def test_a_key_is_asked_for(visit, tiny_tokenizer):
    said, rules = "<think>\nWell.\n</think>\nYes.", Rules(key="a-key")
    with scripted(tiny_tokenizer("v11"), said) as model, Running(model, rules=rules) as server:
        page = visit(server.url)
        expect(page.locator("#key-text")).to_have_text(re.compile("^The one it was started with"))
        page.fill("#ask-key [name=key]", "another")
        page.press("#ask-key [name=key]", "Enter")
        expect(page.locator("#key-text")).to_contain_text("That key is not the right one.")
        page.fill("#ask-key [name=key]", "a-key")
        page.press("#ask-key [name=key]", "Enter")
        expect(page.locator("#model")).to_have_text(HUB_ID.partition("/")[2])
        expect(written(ask(page, QUESTION)).locator(".text")).to_have_text("Yes.")


FAILURES = [
    ({"status": 429, "headers": {"Retry-After": "7"}, "json": {}}, "busy with others. Try again in 7 s"),
    ({"status": 400, "json": {"error": {"message": "too long by 3"}}}, "Too long by 3."),
    ({"status": 502, "body": "<h1>Bad gateway</h1>"}, "Error 502."),
    (None, "The server cannot be reached."),
    (
        {"status": 200, "body": 'data: {"id": "a", "choices": [{"delta": {"content": "Half"}}]}\n\n'},
        "broke off",
    ),
    ({"status": 200, "body": 'data: {"error": {"message": "out of memory"}}\n\n'}, "Out of memory."),
]


def failing(answer: dict | None) -> Callable[[Route], None]:
    return lambda route: route.fulfill(**answer) if answer else route.abort()


def test_what_goes_wrong_is_told_and_may_be_tried_again(visit, served):
    page = visit(served.url)
    for answer, told in FAILURES:
        page.route("**/chat/completions", failing(answer), times=1)
        if page.locator(".assistant").count():
            page.locator(".assistant .problem button").click()
        else:
            ask(page, QUESTION)
        expect(page.locator(".assistant .problem")).to_contain_text(told)
        expect(page.locator("#status")).to_contain_text(told)
    page.locator(".assistant .problem button").click()
    expect(page.locator("#question")).to_be_focused()
    expect(written(page.locator(".assistant")).locator(".text")).to_contain_text("7")
    expect(page.locator(".problem:visible")).to_have_count(0)


@pytest.fixture(scope="module")
def sheet(browser, served) -> Iterator[Page]:
    """A page that only renders texts."""
    with browser.new_context() as context:
        page = context.new_page()
        page.goto(served.url)
        yield page


def shown(page: Page, text: str) -> Locator:
    """A text of the model, as the page renders it."""
    page.evaluate(
        """async (text) => {
            const { show } = await import('/page/markdown.js');
            const here = Object.assign(document.createElement('div'), { id: 'here', className: 'text' });
            document.getElementById('here')?.remove();
            document.body.append(here); // beside the page's own, which may still be at work
            show(here, text);
        }""",
        text,
    )
    return page.locator("#here")


HOSTILE = [
    '<img src=x onerror="window.hit = 1">',
    "<script>window.hit = 1</script>",
    "<svg/onload=window.hit=1>",
    "[a](javascript:window.hit=1)",
    "[a](JaVaScRiPt:window.hit=1)",
    "[a](data:text/html,<script>window.hit=1</script>)",
    '[a](x "onmouseover=window.hit=1")',
    "![a](http://127.0.0.1:9/a.png)",
    "<http://127.0.0.1:9/><iframe src=//127.0.0.1:9></iframe>",
    '```html"><img src=x onerror=window.hit=1>\nx\n```',
    "`<img src=x onerror=window.hit=1>`",
    r"$\href{javascript:window.hit=1}{x}$",
    r"$$\includegraphics{http://127.0.0.1:9/a.png}$$",
    r"\(\class{x}{<img src=x onerror=window.hit=1>}\)",
    r"$\text{<img src=x onerror=window.hit=1>}$",
    "| <img src=x onerror=window.hit=1> | b |\n|--|--|\n| <b onclick=window.hit=1>c</b> | d |",
    "<form action=//127.0.0.1:9><button>go</button></form>",
    '<a id="question" name="turns">clobbered</a>',
    "<math><mtext><table><mglyph><style><img src=x onerror=window.hit=1>",
]


def test_nothing_the_model_says_runs_or_loads(sheet, served):
    asked = []
    sheet.on("request", lambda request: asked.append(request.url))
    for text in HOSTILE:
        here = shown(sheet, text)
        assert here.inner_text().strip()
        assert here.locator("img, script, iframe, form, style, svg, object, link").count() == 0, text
        assert not [
            name
            for name in here.evaluate("e => [...e.querySelectorAll('*')].flatMap(x => x.getAttributeNames())")
            if name.startswith("on") or name in ("src", "style", "id", "name", "action")
        ], text
        links = here.evaluate("e => [...e.querySelectorAll('a')].map(x => x.getAttribute('href'))")
        assert not [link for link in links if link and not link.startswith(("http", "x"))], text
    sheet.wait_for_timeout(100)
    assert sheet.evaluate("window.hit") is None
    assert [url for url in asked if not url.startswith(served.url)] == []


@pytest.mark.parametrize(
    ("text", "selector", "said"),
    [
        ("$x^2$", "math msup", "x2"),
        (r"\(a_1\)", "math msub", None),
        (r"$$\frac{1}{2}$$", ".math.display mfrac", None),
        ("Here\n\\[\n\\sqrt{2}\n\\]\nit is", ".math.display msqrt", None),
        ("\\begin{align}a &= b\\\\ c &= d\\end{align}", "math mtable", None),
        ("- $$\n  x\n  $$", "li .math.display math", None),
        ("It is $5 and then $10.", "#here", "It is $5 and then $10."),
        ("`$x$`", "code", "$x$"),
        (r"$\nosuch{$", "code", r"\nosuch{"),
        ("a\nb", "p br", None),
        ("| a | b |\n|--|--:|\n| 1 | 2 |", ".wide td[align=right]", "2"),
        ("```python\nif x: pass\n```", ".code .hljs-keyword >> nth=0", "if"),
        ("```none\n<b>\n```", ".code pre", "<b>"),
        ("1. a\n   - b", "ol li ul li", "b"),
        ("**b** *i* ~~d~~ [l](https://example.org)", "a[rel~=noopener][target=_blank]", "l"),
        ("<b>as text</b>", "#here", "<b>as text</b>"),
    ],
)
def test_text_is_shown_as_it_is_meant(sheet, text, selector, said):
    found = shown(sheet, text).page.locator(selector)
    expect(found).to_have_count(1)
    if said is not None:
        assert (found.text_content() or "").strip() == said


def test_text_that_grows_ends_as_if_shown_at_once(sheet):
    text = "# Title\n\nOne $x$ two.\n\n- a\n- b\n\n```py\nx = 1\n```\n\n"
    text += "| a |\n|--|\n| 1 |\n\n\\[ y \\]\n\nEnd [1].\n\n[1]: /l"
    whole = shown(sheet, text).inner_html()
    grown = sheet.evaluate(
        """async (text) => {
            const { show } = await import('/page/markdown.js');
            const element = document.createElement('div');
            for (let end = 0; end <= text.length; end += 1) show(element, text.slice(0, end));
            return element.innerHTML;
        }""",
        text,
    )
    assert grown == whole


def test_events_are_read_however_they_are_cut(sheet):
    assert sheet.evaluate(
        """async () => {
            const { events } = await import('/page/client.js');
            const sent = ': ping\\r\\n\\r\\ndata: {"a": "é😀"}\\n\\ndata: [DONE]\\n\\n';
            const bytes = new TextEncoder().encode(sent);
            for (let size = 1; size < bytes.length; size += 1) {
                const pieces = [];
                for (let at = 0; at < bytes.length; at += size) pieces.push(bytes.slice(at, at + size));
                const found = [];
                for await (const data of events(new Blob(pieces).stream())) found.push(data);
                if (found.join() !== '{"a": "é😀"},[DONE]') return found.join();
            }
            return true;
        }"""
    )


def test_each_paragraph_has_the_direction_of_its_own_text(sheet):
    here = shown(sheet, "مرحبا بالعالم\n\n- أولاً\n\nHello\n\n안녕하세요\n\n```py\nx\n```")
    ways = here.evaluate("e => [...e.children].map(x => getComputedStyle(x.firstElementChild).direction)")
    assert ways == ["rtl", "rtl", "ltr", "ltr", "ltr"]


def test_on_a_phone(visit, served):
    page = visit(served.url, viewport={"width": 375, "height": 700}, has_touch=True, is_mobile=True)
    page.fill("#question", "12 + 5")
    page.press("#question", "Enter")  # a new line: a phone's keyboard has no Shift + Enter
    expect(page.locator("#turns > li")).to_have_count(0)
    page.locator("#send").tap()
    written(page.locator(".assistant"))
    page.locator(".assistant .actions [data-do=again]").tap()
    written(page.locator(".assistant"))
    expect(page.locator("#question")).not_to_be_focused()  # its keyboard would cover the reply
    page.locator("#open-settings").tap()
    for size in page.locator("#settings :is(input:not([type=checkbox]), textarea)").evaluate_all(
        "fields => fields.map((field) => parseFloat(getComputedStyle(field).fontSize))"
    ):
        assert size >= 16  # a phone zooms into smaller ones
    page.locator("#settings menu button:not(.quiet)").tap()
    shown(
        page, "```\n" + "x" * 300 + "\n```\n\n$$" + "x+" * 100 + "x$$\n\n|" + " a |" * 30 + "\n|" + "--|" * 30
    )
    assert page.evaluate("document.documentElement.scrollWidth") == 375


def test_a_long_question_leaves_room_for_its_answer(visit, served):
    page = visit(served.url)
    ask(page, "12 + 5 " * 3000)
    expect(page.locator(".assistant .problem")).to_contain_text("shorten the question")
    assert page.locator(".user .text").bounding_box()["height"] < 700 * 0.61  # type: ignore[index]


def test_light_and_dark(visit, served):
    page = visit(served.url, color_scheme="dark")

    def ground() -> int:
        colour = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
        return sum(int(part) for part in colour[4:-1].split(","))

    assert ground() < 200
    page.locator("#theme").click()
    assert ground() > 600
    page.reload()
    assert ground() > 600


def test_code_is_copied(visit, served):
    page = visit(served.url, permissions=["clipboard-read", "clipboard-write"])
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "A:\n```py\nx = 1\n```"}]
    page.evaluate("turns => localStorage.setItem('magistral.turns', JSON.stringify(turns))", turns)
    page.reload()
    page.locator(".code-head button").click()
    assert page.evaluate("navigator.clipboard.readText()").strip() == "x = 1"
    page.locator(".assistant [data-do=copy]").click()
    assert page.evaluate("navigator.clipboard.readText()") == turns[1]["content"]
