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
MAC_CHROME = Path("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")
BROWSER = BROWSER or (str(MAC_CHROME) if MAC_CHROME.exists() else "")
QUIET_OPTIONS = ["--disable-gpu", "--disable-quic", "--no-first-run"]
QUIET_OPTIONS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
SANDBOX_OPTIONS = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []

expect.set_options(timeout=15_000)

pytestmark = pytest.mark.skipif(not BROWSER, reason="no Chromium here")

LONG_REPLY = "<think>\n" + "Let me go on and on about this.\n" * 200 + "</think>\nSo it is 85."


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=QUIET_OPTIONS + SANDBOX_OPTIONS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens pages; at the end, none may have sent requests elsewhere or raised errors."""
    contexts, problems, requested = [], [], []

    def new_page(address: str, **options) -> Page:
        contexts.append(browser.new_context(**({"viewport": {"width": 1000, "height": 700}} | options)))
        page = contexts[-1].new_page()
        page.set_default_timeout(15_000)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on(
            "console",
            lambda message: problems.append(message.text) if "Content Security" in message.text else None,
        )
        page.on("request", lambda request: requested.append(request.url))
        page.goto(address)
        return page

    yield new_page
    for context in contexts:
        context.close()
    assert problems == []
    origins = {"/".join(url.split("/")[:3]) for url in requested}
    assert all(origin.startswith("http://127.0.0.1:") for origin in origins), origins


def ask(page: Page, text: str) -> Locator:
    """Send a message; returns the element of its reply."""
    at = page.locator("#turns > li").count()
    page.fill("#question", text)
    page.press("#question", "Enter")
    return page.locator("#turns > li").nth(at + 1)


def wait_until_done(reply: Locator) -> Locator:
    expect(reply).to_have_attribute("data-phase", "done")
    return reply


def test_a_chat_is_kept_until_it_is_forgotten(open_page, served):
    page = open_page(served.url)
    expect(page.locator("#question")).to_be_focused()
    expect(page.locator("#model")).to_have_text(HUB_ID.partition("/")[2])
    reply = wait_until_done(ask(page, QUESTION))
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


def test_screen_readers_are_told_who_wrote_each_message(open_page, served):
    page = open_page(served.url)
    wait_until_done(ask(page, QUESTION))
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


def test_settings_are_kept_and_sent(open_page, served):
    page = open_page(served.url)
    bodies = []
    page.on("request", lambda request: bodies.append(request.post_data_json) if request.post_data else None)
    page.locator("#open-settings").click()
    values = {"think_budget": 30, "max_tokens": 60, "temperature": 0.5, "top_p": 0.9, "seed": 7}
    for name, value in values.items():
        page.fill(f"#settings [name={name}]", str(value))
    page.fill("#settings [name=system]", "Be brief.")
    page.press("#settings [name=seed]", "Escape")
    page.reload()
    first = wait_until_done(ask(page, QUESTION)).locator(".text").text_content()
    assert {name: bodies[0][name] for name in values} == values
    assert bodies[0]["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": QUESTION},
    ]
    page.locator(".assistant .actions [data-do=again]").click()
    assert wait_until_done(page.locator(".assistant")).locator(".text").text_content() == first
    assert bodies[1] == bodies[0]
    page.locator("#open-settings").click()
    page.locator("#settings [name=think]").uncheck()
    page.locator("#defaults").wait_for()
    page.keyboard.press("Escape")
    reply = wait_until_done(ask(page, "12 + 5"))
    expect(reply.locator(".thinking")).to_be_hidden()
    assert bodies[2]["reasoning_effort"] == "none"
    assert [message["role"] for message in bodies[2]["messages"]] == ["system", "user", "assistant", "user"]


def test_editing_a_message_replaces_what_followed(open_page, served):
    page = open_page(served.url)
    wait_until_done(ask(page, "12 + 5"))
    wait_until_done(ask(page, "6 + 6"))
    page.locator(".user").first.hover()
    page.locator(".user [data-do=edit]").first.click()
    expect(page.locator("#question")).to_have_value("12 + 5")
    page.keyboard.press("Escape")
    expect(page.locator("#question")).to_have_value("")
    page.locator(".user [data-do=edit]").first.click()
    page.fill("#question", QUESTION)
    page.press("#question", "Enter")
    expect(page.locator("#turns > li")).to_have_count(2)
    expect(wait_until_done(page.locator(".assistant")).locator(".text")).to_contain_text("7")


def test_unfinished_and_blank_questions_are_not_sent(open_page, served):
    page = open_page(served.url)
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
def slow_server(tiny_tokenizer) -> Iterator[Running]:
    with scripted(tiny_tokenizer("v11"), LONG_REPLY, step_seconds=0.02) as model, Running(model) as server:
        yield server


def test_thinking_is_shown_and_can_be_ended(open_page, slow_server):
    page = open_page(slow_server.url)
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
    expect(wait_until_done(reply)).to_have_attribute("aria-busy", "false")


@pytest.mark.parametrize("control", ["Escape", "button"])
def test_stopping_a_reply_also_stops_the_server(open_page, slow_server, control):
    page = open_page(slow_server.url)
    reply = ask(page, QUESTION)
    expect(reply).to_have_attribute("data-phase", "thinking")
    assert not slow_server.idle
    if control == "button":
        page.locator("#stop").click()
    else:
        page.keyboard.press("Escape")
    expect(wait_until_done(reply).locator(".figures")).to_have_text("Stopped.")
    expect(page.locator("#question")).to_be_focused()
    until(lambda: slow_server.idle)


def test_a_reload_keeps_the_unfinished_reply(open_page, slow_server):
    page = open_page(slow_server.url)
    expect(ask(page, QUESTION).locator(".reasoning")).to_contain_text("on and on")
    page.reload()
    expect(page.locator(".problem")).to_contain_text("The page was left before the answer was whole.")
    page.locator("summary").click()
    expect(page.locator(".reasoning")).to_contain_text("on and on")


def test_the_page_asks_for_the_api_key(open_page, tiny_tokenizer):
    text, rules = "<think>\nWell.\n</think>\nYes.", Rules(key="a-key")
    with scripted(tiny_tokenizer("v11"), text) as model, Running(model, rules=rules) as server:
        page = open_page(server.url)
        expect(page.locator("#key-text")).to_have_text(re.compile("^The one it was started with"))
        page.fill("#ask-key [name=key]", "another")
        page.press("#ask-key [name=key]", "Enter")
        expect(page.locator("#key-text")).to_contain_text("That key is not the right one.")
        page.fill("#ask-key [name=key]", "a-key")
        page.press("#ask-key [name=key]", "Enter")
        expect(page.locator("#model")).to_have_text(HUB_ID.partition("/")[2])
        expect(wait_until_done(ask(page, QUESTION)).locator(".text")).to_have_text("Yes.")


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


def respond_with(answer: dict | None) -> Callable[[Route], None]:
    return lambda route: route.fulfill(**answer) if answer else route.abort()


def test_failures_are_shown_and_can_be_retried(open_page, served):
    page = open_page(served.url)
    for answer, message in FAILURES:
        page.route("**/chat/completions", respond_with(answer), times=1)
        if page.locator(".assistant").count():
            page.locator(".assistant .problem button").click()
        else:
            ask(page, QUESTION)
        expect(page.locator(".assistant .problem")).to_contain_text(message)
        expect(page.locator("#status")).to_contain_text(message)
    page.locator(".assistant .problem button").click()
    expect(page.locator("#question")).to_be_focused()
    expect(wait_until_done(page.locator(".assistant")).locator(".text")).to_contain_text("7")
    expect(page.locator(".problem:visible")).to_have_count(0)


@pytest.fixture(scope="module")
def rendering_page(browser, served) -> Iterator[Page]:
    """A page for rendering texts only."""
    with browser.new_context() as context:
        page = context.new_page()
        page.goto(served.url)
        yield page


def render(page: Page, text: str) -> Locator:
    """Render a text as the page renders the model's; returns its element."""
    page.evaluate(
        """async (text) => {
            const { show } = await import('/page/markdown.js');
            const here = Object.assign(document.createElement('div'), { id: 'here', className: 'text' });
            document.getElementById('here')?.remove();
            document.body.append(here); // outside the chat, which may still be changing
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


def test_model_output_runs_no_script_and_loads_nothing(rendering_page, served):
    requested = []
    rendering_page.on("request", lambda request: requested.append(request.url))
    for text in HOSTILE:
        element = render(rendering_page, text)
        assert element.inner_text().strip()
        assert element.locator("img, script, iframe, form, style, svg, object, link").count() == 0, text
        assert not [
            name
            for name in element.evaluate(
                "e => [...e.querySelectorAll('*')].flatMap(x => x.getAttributeNames())"
            )
            if name.startswith("on") or name in ("src", "style", "id", "name", "action")
        ], text
        links = element.evaluate("e => [...e.querySelectorAll('a')].map(x => x.getAttribute('href'))")
        assert not [link for link in links if link and not link.startswith(("http", "x"))], text
    rendering_page.wait_for_timeout(100)
    assert rendering_page.evaluate("window.hit") is None
    assert [url for url in requested if not url.startswith(served.url)] == []


@pytest.mark.parametrize(
    ("text", "selector", "expected"),
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
def test_markdown_and_formulas_are_rendered(rendering_page, text, selector, expected):
    found = render(rendering_page, text).page.locator(selector)
    expect(found).to_have_count(1)
    if expected is not None:
        assert (found.text_content() or "").strip() == expected


def test_text_rendered_as_it_grows_ends_like_text_rendered_at_once(rendering_page):
    text = "# Title\n\nOne $x$ two.\n\n- a\n- b\n\n```py\nx = 1\n```\n\n"
    text += "| a |\n|--|\n| 1 |\n\n\\[ y \\]\n\nEnd [1].\n\n[1]: /l"
    at_once = render(rendering_page, text).inner_html()
    grown = rendering_page.evaluate(
        """async (text) => {
            const { show } = await import('/page/markdown.js');
            const element = document.createElement('div');
            for (let end = 0; end <= text.length; end += 1) show(element, text.slice(0, end));
            return element.innerHTML;
        }""",
        text,
    )
    assert grown == at_once


def test_events_are_read_wherever_the_stream_is_split(rendering_page):
    assert rendering_page.evaluate(
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


def test_each_paragraph_has_the_direction_of_its_own_text(rendering_page):
    element = render(rendering_page, "مرحبا بالعالم\n\n- أولاً\n\nHello\n\n안녕하세요\n\n```py\nx\n```")
    directions = element.evaluate(
        "e => [...e.children].map(x => getComputedStyle(x.firstElementChild).direction)"
    )
    assert directions == ["rtl", "rtl", "ltr", "ltr", "ltr"]


def test_the_page_works_on_a_phone(open_page, served):
    page = open_page(served.url, viewport={"width": 375, "height": 700}, has_touch=True, is_mobile=True)
    page.fill("#question", "12 + 5")
    page.press("#question", "Enter")  # a new line: a phone's keyboard has no Shift + Enter
    expect(page.locator("#turns > li")).to_have_count(0)
    page.locator("#send").tap()
    wait_until_done(page.locator(".assistant"))
    page.locator(".assistant .actions [data-do=again]").tap()
    wait_until_done(page.locator(".assistant"))
    expect(page.locator("#question")).not_to_be_focused()  # its keyboard would cover the reply
    page.locator("#open-settings").tap()
    for size in page.locator("#settings :is(input:not([type=checkbox]), textarea)").evaluate_all(
        "fields => fields.map((field) => parseFloat(getComputedStyle(field).fontSize))"
    ):
        assert size >= 16  # a phone zooms into smaller ones
    page.locator("#settings menu button:not(.quiet)").tap()
    render(
        page, "```\n" + "x" * 300 + "\n```\n\n$$" + "x+" * 100 + "x$$\n\n|" + " a |" * 30 + "\n|" + "--|" * 30
    )
    assert page.evaluate("document.documentElement.scrollWidth") == 375


def test_a_long_question_leaves_room_for_its_answer(open_page, served):
    page = open_page(served.url)
    ask(page, "12 + 5 " * 3000)
    expect(page.locator(".assistant .problem")).to_contain_text("shorten the question")
    assert page.locator(".user .text").bounding_box()["height"] < 700 * 0.61  # type: ignore[index]


def test_the_theme_follows_the_system_until_the_user_chooses(open_page, served):
    page = open_page(served.url, color_scheme="dark")

    def brightness() -> int:
        colour = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
        return sum(int(part) for part in colour[4:-1].split(","))

    assert brightness() < 200
    page.locator("#theme").click()
    assert brightness() > 600
    page.reload()
    assert brightness() > 600


def test_code_and_replies_are_copied(open_page, served):
    page = open_page(served.url, permissions=["clipboard-read", "clipboard-write"])
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "A:\n```py\nx = 1\n```"}]
    page.evaluate("turns => localStorage.setItem('magistral.turns', JSON.stringify(turns))", turns)
    page.reload()
    page.locator(".code-head button").click()
    assert page.evaluate("navigator.clipboard.readText()").strip() == "x = 1"
    page.locator(".assistant [data-do=copy]").click()
    assert page.evaluate("navigator.clipboard.readText()") == turns[1]["content"]
