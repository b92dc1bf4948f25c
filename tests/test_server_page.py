"""The page at `/`, in a headless Chromium: the server's files, and an API that answers what a test chooses."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from dsv2_local.server import page as server_page
from dsv2_local.server.access import Access
from dsv2_local.server.app import create_app
from dsv2_local.server.service import Service
from tests.fake_api import CONTEXT, FakeApi, status
from tests.serving import nano, serving

pytest.importorskip("playwright")
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

CHROMIUM = os.environ.get("DSV2_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHROMIUM, reason="no Chromium; $DSV2_CHROMIUM names one")]

Open = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def api() -> FakeApi:
    return FakeApi()


@pytest.fixture
def url(api: FakeApi) -> Iterator[str]:
    with serving(api.app()) as url:
        yield url


@pytest.fixture
def open_page(browser: Browser, url: str) -> Iterator[Open]:
    """Opens the page in a browser without a history; what its scripts and its policy complain about fails the test."""
    contexts: list[BrowserContext] = []
    complaints: list[str] = []

    def open_page(**options: Any) -> Page:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
        context.set_default_timeout(10_000)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.goto(url)
        ready(page)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not [each for each in complaints if "Failed to load resource" not in each]


@pytest.fixture
def page(open_page: Open) -> Page:
    return open_page()


def ready(page: Page) -> None:
    page.wait_for_selector("body[data-ready=true]")


def ask(page: Page, text: str) -> None:
    page.locator("#prompt").fill(text)
    page.locator("#prompt").press("Enter")


def answered(page: Page) -> None:
    expect(page.locator(".assistant").last).to_have_attribute("aria-busy", "false")


def until(page: Page, holds: Callable[[], object]) -> None:
    for _ in range(500):
        if holds():
            return
        page.wait_for_timeout(20)
    raise AssertionError("it did not happen")


def saved(page: Page) -> None:
    """Wait until the browser has the conversation as it is shown."""
    has = """async () => {
        const conversation = await (await import("/store.js")).load(location.hash.slice(1));
        return conversation?.messages.every(({ state }) => state === undefined || state === "done");
    }"""
    until(page, lambda: page.evaluate(has))


def titles(page: Page) -> list[str]:
    return page.locator("#conversations .open").all_inner_texts()


def test_the_files_are_a_fixed_table_with_strict_headers(url: str) -> None:
    folder = Path(server_page.__file__).parent / "page"
    assert {file.name for file in folder.iterdir()} == set(server_page.FILES)
    types = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
    for path, name in server_page.PATHS.items():
        found = httpx.get(url + path)
        assert found.status_code == 200
        assert found.content == (folder / name).read_bytes()
        assert found.headers["content-type"].startswith(types[name.rpartition(".")[2]])
        policy = found.headers["content-security-policy"]
        assert policy.startswith("default-src 'none';")
        assert "unsafe" not in policy
        assert found.headers["x-content-type-options"] == "nosniff"
        assert found.headers["x-frame-options"] == "DENY"
        assert found.headers["referrer-policy"] == "no-referrer"
        assert found.headers["cache-control"] == "no-cache"
        again = httpx.get(url + path, headers={"If-None-Match": f'W/"x", {found.headers["etag"]}'})
        assert (again.status_code, again.content) == (304, b"")
        assert httpx.head(url + path).content == b""
    for path in ("/page.py", "/page/main.js", "/%2e%2e/page.py", "/..%2fpage.py", "/page", "/index.html"):
        assert httpx.get(url + path).status_code == 404
    assert httpx.post(url + "/").status_code == 405


def test_scripts_never_parse_html_from_text() -> None:
    for file in (Path(server_page.__file__).parent / "page").glob("*.js"):
        text = file.read_text(encoding="utf-8")
        for word in (
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "DOMParser",
            "document.write",
            "eval(",
            "Function(",
        ):
            assert word not in text, file.name


def test_nothing_leaves_for_another_host(api: FakeApi, page: Page, url: str) -> None:
    asked: list[str] = []
    page.context.on("request", lambda request: asked.append(request.url))
    api.pieces = ["![a](https://elsewhere.example/a.png) [b](https://elsewhere.example) https://elsewhere.example/c"]
    page.reload()
    ready(page)
    ask(page, "Where?")
    answered(page)
    page.locator("#machine-toggle").click()
    until(page, lambda: api.polls > 2)
    assert len(asked) > len(server_page.FILES)
    assert {each for each in asked if not each.startswith(url)} == set()
    assert page.locator(".text img").count() == 0
    links = page.locator(".text a")
    assert [links.nth(at).get_attribute("rel") for at in range(links.count())] == ["noopener noreferrer"] * 3
    assert page.evaluate("document.cookie") == ""


def test_an_answer_appears_as_it_is_written(api: FakeApi, page: Page) -> None:
    api.released = 0
    ask(page, "What is a violin?")
    answer = page.locator(".assistant")
    expect(answer).to_have_attribute("aria-busy", "true")
    expect(page.locator("#stop")).to_be_visible()
    expect(page.locator("#send")).to_be_hidden()
    api.released = 1
    expect(answer.locator(".text")).to_have_text("A violin ", use_inner_text=False)
    api.released = 2
    expect(answer.locator(".text")).to_have_text("A violin is a bowed ")
    expect(answer.locator(".figures")).to_have_count(0)
    api.released = None
    answered(page)
    expect(answer.locator(".text p")).to_have_text("A violin is a bowed instrument.")
    expect(answer.locator(".figures")).to_contain_text("prompt 42, reused 30 · answer 3 tokens · ")
    expect(answer.locator(".figures")).to_contain_text("tok/s")
    expect(page.locator("#announcer")).to_contain_text("A violin is a bowed instrument.")
    expect(page.locator("#gauge")).to_contain_text("45 / 2,048")
    assert api.bodies[0]["messages"] == [{"role": "user", "content": "What is a violin?"}]
    assert api.bodies[0]["stream_options"] == {"include_usage": True}


@pytest.mark.parametrize("how", ["button", "key"])
def test_stop_closes_the_request_and_keeps_what_was_written(api: FakeApi, page: Page, how: str) -> None:
    api.released = 1
    ask(page, "What is a violin?")
    expect(page.locator(".text")).to_contain_text("A violin")
    if how == "button":
        page.locator("#stop").click()
    else:
        page.keyboard.press("Escape")
    answered(page)
    until(page, lambda: api.left == 1)
    expect(page.locator(".assistant")).to_contain_text("Stopped.")
    expect(page.locator(".text")).to_have_text("A violin")
    expect(page.locator("#prompt")).to_be_focused()
    api.released = None
    page.get_by_role("button", name="Regenerate").click()
    answered(page)
    expect(page.locator(".text")).to_have_text("A violin is a bowed instrument.")
    assert api.bodies[1]["messages"] == api.bodies[0]["messages"]
    expect(page.locator(".branches")).to_have_text("2/2")


def test_an_answer_goes_on_while_another_conversation_is_shown(api: FakeApi, page: Page) -> None:
    api.released = 1
    ask(page, "First")
    expect(page.locator(".text")).to_contain_text("A violin")
    page.keyboard.press("Control+k")
    expect(page.locator("#thread li")).to_have_count(0)
    expect(page.locator("#conversations .pulse")).to_have_count(1)
    api.released = None
    expect(page.locator("#conversations .pulse")).to_have_count(0)
    page.locator("#conversations .open").click()
    expect(page.locator(".text")).to_have_text("A violin is a bowed instrument.")


HOSTILE = """<script>window.hacked = 1</script> <img src=x onerror="window.hacked = 2">

<a href="javascript:window.hacked = 3">a</a> [b](javascript:window.hacked=4) [c](data:text/html,<script>1</script>)
[d](JaVaScRiPt:alert) [e](//elsewhere.example) [f](vbscript:x) <javascript:alert(1)> [g]( &#106;avascript:x )

```"><script>window.hacked = 5</script>
<img src=x onerror=alert(1)>
```

| <b>x</b> | `<i>` |
|---|---|
| <svg onload=alert(1)> | <iframe src=x> |

# <style>*{display:none}</style>
"""


def test_what_looks_like_html_stays_text(api: FakeApi, page: Page) -> None:
    api.pieces = list(HOSTILE)
    ask(page, "<b>bold?</b> <script>window.hacked = 6</script>")
    answered(page)
    text = page.locator(".text")
    assert page.evaluate("window.hacked") is None
    assert text.locator("script, img, iframe, svg svg, style, b, i, a, object, form, input").count() == 0
    expect(text).to_contain_text("<script>window.hacked = 1</script>")
    expect(text).to_contain_text('<img src=x onerror="window.hacked = 2">')
    expect(text).to_contain_text("<svg onload=alert(1)>")
    expect(page.locator(".bubble")).to_have_text("<b>bold?</b> <script>window.hacked = 6</script>")
    assert page.locator(".bubble *").count() == 0
    expect(page.locator("#title")).to_have_text("<b>bold?</b> <script>window.hacked = 6</script>")
    assert titles(page) == ["<b>bold?</b> <script>window.hacked = 6</script>"]


RENDER = """async ([text, steps]) => {
    const { MarkdownView } = await import("/markdown.js");
    const into = document.createElement("div"), view = new MarkdownView(into);
    for (const end of steps) view.update(text.slice(0, end), false);
    view.update(text, true);
    for (const button of into.querySelectorAll("button, figcaption")) button.remove();
    for (const each of into.querySelectorAll("*"))
        for (const { name } of [...each.attributes]) if (!["href", "start"].includes(name)) each.removeAttribute(name);
    return into.innerHTML;
}"""

CASES = {
    "one\ntwo  \nthree": "<p>one<br>two<br>three</p>",
    "a *b* **c** ***d*** ~~e~~ f_g_h _i_": (
        "<p>a <em>b</em> <strong>c</strong> <em><strong>d</strong></em> <del>e</del> f_g_h <em>i</em></p>"
    ),
    "2 * 3 * 4, 5*6, \\*no\\* `*no*` **open": "<p>2 * 3 * 4, 5*6, *no* <code>*no*</code> **open</p>",
    "``a ` b`` and `open": "<p><code>a ` b</code> and `open</p>",
    "# A\n### B ##\n#no": "<h3>A</h3><h5>B</h5><p>#no</p>",
    "- a\n- b\n  - c\n    text\n- d": "<ul><li>a</li><li>b<ul><li>c<br>text</li></ul></li><li>d</li></ul>",
    "1. a\n\n   more\n2. b\n": "<ol><li><p>a</p><p>more</p></li><li><p>b</p></li></ol>",
    "3. a\n  - b\n4. c": '<ol start="3"><li>a<ul><li>b</li></ul></li><li>c</li></ol>',
    "- [x] a\n- [ ] b": "<ul><li><span>☑ </span>a</li><li><span>☐ </span>b</li></ul>",
    "- a\n\n```\nx\n```\n- b": "<ul><li>a</li></ul><figure><pre><code>x</code></pre></figure><ul><li>b</li></ul>",
    "1. a\n   ```py\n   x = 1\n     y\n   ```\n2. b": (
        "<ol><li>a<figure><pre><code>x = 1\n  y</code></pre></figure></li><li>b</li></ol>"
    ),
    "> a\n> > b\nlazy\n\nc": "<blockquote><p>a</p><blockquote><p>b<br>lazy</p></blockquote></blockquote><p>c</p>",
    "~~~~\n```\n~~~\n~~~~\nend": "<figure><pre><code>```\n~~~</code></pre></figure><p>end</p>",
    "a\n***\nb": "<p>a</p><hr><p>b</p>",
    "|a|b\\|c|\n|:-|-:|\n|`x`|\n\nend": (
        "<div><table><thead><tr><th>a</th><th>b|c</th></tr></thead>"
        "<tbody><tr><td><code>x</code></td><td></td></tr></tbody></table></div><p>end</p>"
    ),
    "[a *b*](https://x.example/?q=1&r=(2)) https://y.example/a_b_c. <mailto:a@b.example>": (
        '<p><a href="https://x.example/?q=1&amp;r=(2)">a <em>b</em></a> '
        '<a href="https://y.example/a_b_c">https://y.example/a_b_c</a>. '
        '<a href="mailto:a@b.example">mailto:a@b.example</a></p>'
    ),
    "(see https://x.example/a) [no] [no](no) ![i](https://x.example/i.png)": (
        '<p>(see <a href="https://x.example/a">https://x.example/a</a>) [no] [no](no) '
        '<a href="https://x.example/i.png">i</a></p>'
    ),
    "a &lt;b&gt; &amp;amp; & &copy;<br>c": "<p>a &lt;b&gt; &amp;amp; &amp; &amp;copy;<br>c</p>",
    "```js\nunfinished": "<figure><pre><code>unfinished</code></pre></figure>",
}  # fmt: skip


def test_markdown(page: Page) -> None:
    for text, expected in CASES.items():
        assert page.evaluate(RENDER, [text, []]) == expected, text


def test_markdown_of_a_stream_is_that_of_the_whole(page: Page) -> None:
    whole = "\n\n".join([*CASES, HOSTILE, *CASES])
    expected = page.evaluate(RENDER, [whole, []])
    for stride in (1, 3, 7):
        assert page.evaluate(RENDER, [whole, list(range(0, len(whole), stride))]) == expected


def test_markdown_takes_no_time_with_hostile_texts(page: Page) -> None:
    """A text that took quadratic time would take minutes."""
    page.set_default_timeout(30_000)
    for part in (
        "[",
        "![",
        "*a",
        "**a ",
        "_ a_",
        "`a``",
        "<",
        "> ",
        "- ",
        "\\",
        "&",
        "[a](",
        "|a",
        "~~a~ ",
        "https://a ",
        "((",
    ):
        text = part * 20_000
        shown = page.evaluate(
            """async (text) => {
                const { MarkdownView } = await import("/markdown.js"), into = document.createElement("div");
                new MarkdownView(into).update(text, true);
                return into.childElementCount;
            }""",
            text,
        )
        assert shown > 0, part
    nested = "\n".join("> " * depth + "- " * depth + "a" for depth in range(200))
    assert "a" in page.evaluate(RENDER, [nested, []])


def test_a_message_is_edited_and_both_branches_are_kept(api: FakeApi, page: Page) -> None:
    ask(page, "What is a violin?")
    answered(page)
    api.pieces = ["They ", "differ."]
    ask(page, "And a viola?")
    answered(page)
    first = page.locator(".user").first
    first.hover()
    first.get_by_role("button", name="Edit and ask again").click()
    editor = page.get_by_role("textbox", name="Edit message")
    expect(editor).to_have_value("What is a violin?")
    editor.fill("What is a harp?")
    editor.press("Enter")
    answered(page)
    assert api.bodies[-1]["messages"] == [{"role": "user", "content": "What is a harp?"}]
    expect(page.locator("#thread > li")).to_have_count(2)
    expect(first.locator(".branches")).to_have_text("2/2")
    first.get_by_role("button", name="Version before").click()
    expect(page.locator("#thread > li")).to_have_count(4)
    expect(first.get_by_role("button", name="Version after")).to_be_focused()
    expect(page.locator(".text").first).to_have_text("A violin is a bowed instrument.")
    page.get_by_role("button", name="Regenerate").last.click()
    answered(page)
    assert [each["role"] for each in api.bodies[-1]["messages"]] == ["user", "assistant", "user"]
    saved(page)
    page.reload()
    ready(page)
    expect(page.locator("#thread > li")).to_have_count(4)
    expect(page.locator(".assistant .branches")).to_have_text("2/2")
    first = page.locator(".user").first
    first.hover()
    first.get_by_role("button", name="Edit and ask again").click()
    page.get_by_role("textbox", name="Edit message").press("Escape")
    expect(first.get_by_role("button", name="Edit and ask again")).to_be_focused()


def menu(page: Page, title: str, entry: str) -> None:
    page.get_by_role("button", name=f"More for {title}").click()
    page.get_by_role("menuitem", name=entry).click()


def test_conversations_are_kept_renamed_exported_and_deleted(api: FakeApi, page: Page, tmp_path: Path) -> None:
    api.pieces = ["**Rain.**"]
    for text in ("A haiku", "A sonnet"):
        page.keyboard.press("Control+k")
        ask(page, text)
        answered(page)
        saved(page)
    page.reload()
    ready(page)
    expect(page.locator("#conversations .open")).to_have_text(["A sonnet", "A haiku"])
    expect(page.locator(".text strong")).to_have_text("Rain.")
    menu(page, "A haiku", "Rename")
    page.get_by_role("textbox", name="Title").fill("Weather")
    page.keyboard.press("Enter")
    expect(page.locator("#conversations .open")).to_have_text(["A sonnet", "Weather"])
    with page.expect_download() as download:
        menu(page, "Weather", "Export as Markdown")
    assert download.value.suggested_filename == "Weather.md"
    download.value.save_as(tmp_path / "a.md")
    assert (tmp_path / "a.md").read_text() == "# Weather\n\n## You\n\nA haiku\n\n## Answer\n\n**Rain.**\n"
    with page.expect_download() as download:
        menu(page, "Weather", "Export as JSON")
    download.value.save_as(tmp_path / "a.json")
    exported = json.loads((tmp_path / "a.json").read_text())
    assert [each["content"] for each in exported["messages"]] == ["A haiku", "**Rain.**"]
    menu(page, "A sonnet", "Delete")
    expect(page.locator("#conversations .open")).to_have_text(["Weather"])
    page.get_by_role("button", name="Undo").click()
    expect(page.locator("#conversations .open")).to_have_text(["A sonnet", "Weather"])
    menu(page, "Weather", "Delete")
    expect(page.locator("#conversations .open")).to_have_text(["A sonnet"])
    page.reload()
    ready(page)
    expect(page.locator("#conversations .open")).to_have_text(["A sonnet"])


def test_an_answer_that_a_reload_has_cut_off_is_told(api: FakeApi, page: Page) -> None:
    api.released = 1
    ask(page, "What is a violin?")
    expect(page.locator(".text")).to_contain_text("A violin")
    page.reload()
    ready(page)
    until(page, lambda: api.left == 1)
    api.released = None
    expect(page.locator("#thread .problem")).to_contain_text("before the answer ended.")
    page.get_by_role("button", name="Retry").click()
    answered(page)
    expect(page.locator(".text")).to_have_text("A violin is a bowed instrument.")


def test_full_storage_is_told(page: Page) -> None:
    page.evaluate("""() => {
        IDBObjectStore.prototype.put = () => { throw new DOMException("full", "QuotaExceededError"); };
    }""")
    ask(page, "What is a violin?")
    answered(page)
    expect(page.locator(".text")).to_have_text("A violin is a bowed instrument.")
    expect(page.locator(".toast")).to_contain_text("The browser’s storage is full")
    expect(page.locator("#stored")).to_contain_text("not kept")
    expect(page.locator(".toast")).to_have_count(1)


def test_the_key_is_asked_for(api: FakeApi, open_page: Open) -> None:
    api.key = "right"
    page = open_page()
    dialog = page.get_by_role("dialog", name="API key")
    expect(dialog).to_be_visible()
    dialog.get_by_label("Key", exact=True).fill("wrong")
    page.keyboard.press("Enter")
    expect(dialog).to_contain_text("does not accept this key")
    dialog.get_by_role("button", name="Cancel").click()
    expect(dialog).to_be_hidden()
    ask(page, "What is a violin?")
    dialog.get_by_label("Key", exact=True).fill("right")
    dialog.get_by_role("button", name="Use this key").click()
    answered(page)
    expect(page.locator(".text")).to_have_text("A violin is a bowed instrument.")
    assert page.evaluate("[sessionStorage.length, localStorage.getItem('dsv2.key')]") == [1, None]
    page.reload()
    ready(page)
    expect(page.locator("#gauge")).to_contain_text("45 / 2,048")
    expect(dialog).to_be_hidden()
    page.evaluate("sessionStorage.clear()")
    page.locator("#machine-toggle").click()  # polls do not ask
    expect(page.locator("#machine .problem")).to_contain_text("a key is needed")
    expect(dialog).to_be_hidden()
    ask(page, "Again?")
    expect(dialog).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#thread .problem")).to_contain_text("a key is needed")


@pytest.mark.parametrize(
    ("code", "error", "shown", "button"),
    [
        (429, {"message": "64 answers wait;\nask later", "code": "queue_full"}, "64 answers wait; ask later", "Retry"),
        (400, {"message": "the prompt is too long", "code": "context_length_exceeded"}, "too long", "New chat"),
        (500, {"message": "x" * 1000}, "x" * 299 + "…", "Retry"),
        (503, None, "The server answered 503.", "Retry"),
    ],
)
def test_errors_are_one_line_with_a_remedy(
    api: FakeApi, page: Page, code: int, error: dict[str, str] | None, shown: str, button: str
) -> None:
    api.fail = code, error  # type: ignore[assignment]
    ask(page, "What is a violin?")
    problem = page.locator("#thread .problem")
    expect(problem).to_contain_text(shown)
    api.fail = None
    problem.get_by_role("button", name=button).click()
    if button == "New chat":
        expect(page.locator("#thread li")).to_have_count(0)
    else:
        answered(page)
        expect(page.locator(".text")).to_have_text("A violin is a bowed instrument.")


def test_an_error_in_a_stream_keeps_what_came_before(api: FakeApi, page: Page) -> None:
    api.broken = {"message": "the GPU is gone", "code": None}
    ask(page, "What is a violin?")
    expect(page.locator("#thread .problem")).to_contain_text("the GPU is gone")
    expect(page.locator(".text")).to_have_text("A violin is a bowed instrument.")
    expect(page.locator("#send")).to_be_visible()


def test_a_full_context_is_told(api: FakeApi, page: Page) -> None:
    api.finish, api.prompt_tokens = "length", CONTEXT - 3
    ask(page, "A long one")
    answered(page)
    expect(page.locator("#thread .problem")).to_contain_text("The context of 2,048 tokens is full.")
    expect(page.locator("#gauge")).to_have_class("full")
    api.prompt_tokens = 42
    page.keyboard.press("Control+k")
    ask(page, "A short one")
    answered(page)
    expect(page.locator(".note")).to_have_text("Ended at the longest answer that the settings allow.")


def test_a_server_that_is_gone_is_told(api: FakeApi, page: Page) -> None:
    page.context.set_offline(True)
    ask(page, "What is a violin?")
    expect(page.locator("#thread .problem")).to_contain_text("The server cannot be reached.")
    page.context.set_offline(False)
    page.get_by_role("button", name="Retry").click()
    answered(page)
    expect(page.locator(".text")).to_have_text("A violin is a bowed instrument.")


def test_settings_are_sent_and_kept(api: FakeApi, page: Page) -> None:
    page.get_by_role("button", name="Settings").click()
    dialog = page.get_by_role("dialog", name="Settings")
    dialog.get_by_label("System message").fill("Be brief.")
    dialog.get_by_label("Temperature").fill("0.5")
    dialog.get_by_label("Seed").fill("7")
    dialog.get_by_label("Longest answer").fill("100")
    dialog.get_by_label("Top p").fill("3")
    expect(dialog.get_by_label("Top p")).to_have_attribute("aria-invalid", "true")
    dialog.get_by_text("More").click()
    dialog.get_by_label("Stop strings").fill("END\n\nSTOP")
    page.keyboard.press("Escape")
    page.reload()
    ready(page)
    ask(page, "What is a violin?")
    answered(page)
    body = api.bodies[0]
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    sent = {key: body.get(key) for key in ("temperature", "seed", "max_tokens", "top_p", "top_k", "stop")}
    assert sent == {
        "temperature": 0.5, "seed": 7, "max_tokens": 100, "top_p": None, "top_k": None, "stop": ["END", "STOP"],
    }  # fmt: skip
    page.get_by_role("button", name="Settings (changed)").click()
    expect(dialog.get_by_label("Temperature")).to_have_value("0.5")
    dialog.get_by_role("button", name="Reset").click()
    dialog.get_by_role("button", name="Done").click()
    page.get_by_role("button", name="Regenerate").click()
    answered(page)
    assert not {"temperature", "seed", "max_tokens", "stop"} & set(api.bodies[1])
    assert len(api.bodies[1]["messages"]) == 1


def test_the_keyboard_is_enough(api: FakeApi, page: Page) -> None:
    expect(page.locator("#prompt")).to_be_focused()
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    answered(page)
    assert api.bodies[0]["messages"][0]["content"] == "one\ntwo"
    page.keyboard.press("Enter")  # nothing to send
    assert len(api.bodies) == 1
    page.locator(".skip").focus()
    seen: list[str] = []
    for _ in range(40):
        found = page.evaluate(
            """() => {
                const at = document.activeElement;
                if (at === document.body) return [null];
                const style = getComputedStyle(at), field = at.closest(".field");
                const shown = style.outlineStyle !== "none" || (field && getComputedStyle(field).boxShadow !== "none");
                return [at.getAttribute("aria-label") || at.innerText || at.id, shown, getComputedStyle(at).opacity];
            }"""
        )
        if found[0] in seen or not found[0]:
            break
        assert found[1], f"{found[0]} does not show that it has the focus"
        assert found[2] != "0", found[0]
        seen.append(found[0])
        page.keyboard.press("Tab")
    order = ["Skip to the message box", "Hide conversations", "More for one two", "Machine", "Settings"]
    order += ["Edit and ask again", "Copy answer", "Regenerate", "prompt"]
    assert [each for each in seen if each in order] == order
    page.get_by_role("button", name="More for one two").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("menuitem", name="Rename")).to_be_focused()
    page.keyboard.press("ArrowUp")
    expect(page.get_by_role("menuitem", name="Delete")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="More for one two")).to_be_focused()
    page.keyboard.press("Control+k")
    expect(page.locator("#prompt")).to_be_focused()
    expect(page.locator("#title")).to_have_text("New chat")


LONG = "word " * 40 + "w" * 300 + "\n\n```\n" + "code " * 60 + "\n```\n\n|" + "cell|" * 20 + "\n|" + "-|" * 20 + "\n"


@pytest.mark.parametrize("width", [320, 390, 800, 1100])
def test_narrow_windows_have_no_horizontal_scroll(api: FakeApi, open_page: Open, width: int) -> None:
    api.pieces, api.status = [LONG], status(experts=True)
    page = open_page(viewport={"width": width, "height": 700})
    ask(page, "l" * 300)
    answered(page)

    def fits() -> bool:
        return bool(
            page.evaluate(
                "document.documentElement.scrollWidth <= innerWidth && document.body.scrollWidth <= innerWidth"
            )
        )

    assert fits()
    box = page.locator("#send").bounding_box()
    assert box
    assert box["x"] + box["width"] <= width
    assert page.evaluate(
        "document.getElementById('scroller').scrollWidth <= document.getElementById('scroller').clientWidth"
    )
    page.locator("#machine-toggle").click()
    expect(page.locator(".heat canvas").first).to_be_visible()
    assert fits()
    page.keyboard.press("Escape")
    if width < 800:
        page.locator("#sidebar-open").click()
        expect(page.locator("#sidebar-close")).to_be_focused()
        assert fits()
        page.keyboard.press("Escape")
        expect(page.locator("#sidebar")).to_be_hidden()
        expect(page.locator("#sidebar-open")).to_be_focused()


CONTRAST = """() => {
    const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    const rgba = (colour) => {
        canvas.clearRect(0, 0, 1, 1);
        canvas.fillStyle = colour;
        canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data];
    };
    const over = (top, below) => {
        const a = top[3] / 255;
        return [0, 1, 2].map((at) => top[at] * a + below[at] * (1 - a)).concat(255);
    };
    const background = (element) => {
        const own = element ? rgba(getComputedStyle(element).backgroundColor) : [255, 255, 255, 255];
        return own[3] === 255 ? own : over(own, background(element.parentElement));
    };
    const light = (colour) => {
        const linear = (part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
        const [r, g, b] = colour.map((part) => linear(part / 255));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const element = walker.currentNode.parentElement;
        if (!walker.currentNode.data.trim() || !element.checkVisibility({ opacityProperty: true })) continue;
        if (element.closest(".hidden, :disabled")) continue;
        const below = background(element);
        const [a, b] = [light(over(rgba(getComputedStyle(element).color), below)), light(below)];
        found.push([walker.currentNode.data.trim().slice(0, 40), (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)]);
    }
    return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_contrast(api: FakeApi, open_page: Open, scheme: str) -> None:
    api.status, api.finish, api.prompt_tokens = status(experts=True), "length", CONTEXT
    api.pieces = ["# a\n\n> quote `code` [link](https://x.example)\n\n```py\ncode\n```\n\n|a|\n|-|\n|b|\n\n- [ ] task"]
    page = open_page(color_scheme=scheme)
    below = page.evaluate("getComputedStyle(document.body).backgroundColor")
    channels = [int(part) for part in below.removeprefix("rgb(").removesuffix(")").split(",")]
    assert all(part > 200 for part in channels) if scheme == "light" else all(part < 60 for part in channels)
    texts = page.evaluate(CONTRAST)
    ask(page, "question")
    answered(page)
    page.locator("#machine-toggle").click()
    page.locator(".experts summary").click()
    texts += page.evaluate(CONTRAST)
    page.get_by_role("button", name="More for question").click()
    texts += page.evaluate(CONTRAST)
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Settings").click()
    texts += page.evaluate(CONTRAST)
    assert len(texts) > 100
    assert [each for each in texts if each[1] < 4.5] == []


def test_every_control_has_a_name(api: FakeApi, page: Page) -> None:
    api.status = status(experts=True)
    ask(page, "question")
    answered(page)
    page.locator("#machine-toggle").click()
    expect(page.locator(".experts")).to_be_visible()
    for role in ("button", "textbox", "img", "meter", "progressbar", "navigation", "complementary", "list"):
        for at, found in enumerate(page.get_by_role(role).all()):
            name = found.evaluate("each => each.ariaLabel || each.textContent.trim() || each.labels?.[0]?.textContent")
            assert name or role == "list", (role, at, found.evaluate("each => each.outerHTML"))
    assert page.get_by_role("heading", level=1).count() == 1


def test_motion_is_reduced_if_it_should_be(api: FakeApi, open_page: Open) -> None:
    api.released = 0
    page = open_page(reduced_motion="reduce")
    ask(page, "What is a violin?")
    pulse = page.locator(".assistant .pulse")
    expect(pulse).to_have_css("animation-name", "none")
    api.released = None
    answered(page)


def test_the_machine_is_asked_while_it_is_seen(api: FakeApi, page: Page) -> None:
    api.status = status(experts=True)
    page.wait_for_timeout(1200)
    assert api.polls == 1  # to greet with the model's name
    page.locator("#machine-toggle").click()
    until(page, lambda: api.polls >= 3)
    api.status = status(experts=True, step=3)
    machine = page.locator("#machine")
    expect(machine.locator(".decode .figure").first).to_have_text("21.6 tok/s")
    expect(machine).to_contain_text("3,840 / 8,192 tokens")
    expect(machine).to_contain_text("354 of 512 blocks of 64 tokens")
    expect(machine).to_contain_text("104 GiB of 125 GiB")
    expect(machine.get_by_role("img", name="Blocks of the KV cache: held by answers 28 %")).to_be_visible()
    expect(machine.locator(".experts")).to_contain_text("of 9,440 resident")
    colours = page.evaluate(
        """[...document.querySelectorAll(".heat canvas")].map((canvas) => {
            const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
            return new Set(new Uint32Array(data.buffer)).size;
        })"""
    )
    assert colours[0] > 20  # shades of four colours
    assert colours[1] == 2  # resident or not
    machine.locator("summary").click()
    expect(machine.locator(".experts tbody tr")).to_have_count(59)
    assert len(page.locator(".decode .line").get_attribute("points").split()) >= 3  # type: ignore[union-attr]
    page.evaluate(
        """Object.defineProperty(document, "hidden", { value: true, configurable: true });
        document.dispatchEvent(new Event("visibilitychange"))"""
    )
    page.wait_for_timeout(300)
    polls = api.polls
    page.wait_for_timeout(1500)
    assert api.polls == polls
    page.evaluate("delete document.hidden; document.dispatchEvent(new Event('visibilitychange'))")
    until(page, lambda: api.polls > polls)
    page.locator("#machine-close").click()
    page.wait_for_timeout(300)
    polls = api.polls
    page.wait_for_timeout(1500)
    assert api.polls == polls


def test_the_prompt_is_seen_being_read(api: FakeApi, page: Page) -> None:
    api.status, api.released = status(experts=True), 0
    page.locator("#machine-toggle").click()
    ask(page, "A long one")
    expect(page.locator(".assistant .reading")).to_contain_text("Reading the prompt: 3,072 of 8,192 tokens")
    expect(page.locator(".assistant progress")).to_be_visible()
    api.released = None
    answered(page)
    expect(page.locator(".assistant .reading")).to_have_count(0)


def test_a_model_that_loads_is_waited_for(api: FakeApi, open_page: Open) -> None:
    ready_status = api.status
    api.status = {**ready_status, "state": "loading", "context": None, "device": None}
    page = open_page()
    expect(page.locator("#about")).to_have_text("The model is loading …")
    api.status = ready_status
    expect(page.locator("#about")).to_have_text("CPU · context 2,048 tokens")


def test_two_tabs_share_the_list(api: FakeApi, page: Page, url: str) -> None:
    other = page.context.new_page()
    other.goto(url)
    ready(other)
    ask(page, "From the first tab")
    answered(page)
    expect(other.locator("#conversations .open")).to_have_text(["From the first tab"])


def test_dsv2_nano_answers_behind_its_guard(browser: Browser) -> None:
    service = Service(nano, "dsv2-nano")
    with serving(create_app(service, Access.of("127.0.0.1", keys=["secret"]))) as url:
        page = browser.new_page()
        page.goto(url)
        page.get_by_label("Key", exact=True).fill("secret")
        page.keyboard.press("Enter")
        expect(page.locator("#model")).to_have_text("dsv2-nano")
        expect(page.locator("#about")).to_have_text("CPU · context 2,048 tokens")
        page.get_by_role("button", name="What is a violin?").click()
        answered(page)
        expect(page.locator(".text")).not_to_be_empty()
        expect(page.locator(".figures").last).to_contain_text("prompt 12 · answer")
        assert service.totals.answers == 1
        assert service.loaded
        service.loaded.engine.turn.acquire()  # so that nothing is computed
        try:
            ask(page, "And a viola?")
            until(page, lambda: service.jobs)
            page.locator("#stop").click()
            until(page, lambda: service.totals.cancelled == 1)
            assert not service.jobs
        finally:
            service.loaded.engine.turn.release()
        page.close()
