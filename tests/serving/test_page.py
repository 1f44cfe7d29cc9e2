"""The page as a person uses it, in a real browser."""

import json
import re
import shutil

import pytest

from mixtral_jax.serving.app import PAGE
from tests.serving.chromium import opened
from tests.serving.server import CONFIG, serving, slowly

CHROMIUM = shutil.which("chromium")
SEND = (
    "document.getElementById('text').value = 'the river'; document.getElementById('length').value = {length};"
    "document.getElementById('temperature').value = 0;"
)
STOPPED = "document.getElementById('stop').disabled"


def test_nothing_of_the_page_comes_from_elsewhere():
    assert not re.findall(r"https?://|src=|@import|url\(", PAGE.read_text(encoding="utf-8"))
    with serving() as served:
        response = served.client.get("/")
    assert response.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in response.headers["content-security-policy"]


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian: apt-get install chromium)")
def test_a_person_chats_sees_the_experts_and_stops(monkeypatch):
    with serving(api_key="secret") as served, opened(str(CHROMIUM)) as page:
        page.open(served.url + "/")
        page.wait("!document.getElementById('keyed').hidden")
        page.run("const key = document.getElementById('key'); key.value = 'secret';"
                 "key.dispatchEvent(new Event('change'));")  # fmt: skip
        page.wait("document.title === 'tiny'")

        page.run(SEND.format(length=24) + "document.getElementById('text').focus();")
        page.press("Enter", 13)
        page.wait(f"document.querySelectorAll('.answer span').length > 3 && {STOPPED}")
        tokens = page.run("return [...document.querySelectorAll('.answer span')].map(s => [s.textContent, s.experts])")
        assert all(len(experts) == CONFIG.model.num_layers for _, experts in tokens)
        said = page.run("return chat.map(turn => turn.content)")
        assert said == ["the river", "".join(text for text, _ in tokens)]

        page.run("document.querySelectorAll('.answer span')[1].dispatchEvent(new Event('mouseover', {bubbles: true}))")
        rows = page.run("return [...document.querySelectorAll('#experts tr')].map(r => [...r.querySelectorAll('td')]"
                        ".flatMap((c, i) => c.className ? [i] : []))")  # fmt: skip
        assert rows[1:] == [sorted(chosen) for chosen in tokens[1][1]]
        page.run("document.querySelector('.answer').focus()")
        page.press("ArrowRight", 39)
        assert page.run("return document.querySelector('.chosen').textContent") == tokens[2][0]

        page.size(360, 640)
        assert page.run("return document.documentElement.scrollWidth <= innerWidth")

        monkeypatch.setattr(served.engine.batch, "step", slowly(served.engine.batch.step))
        page.run(SEND.format(length=90) + "document.getElementById('ask').requestSubmit();")
        page.wait("document.querySelectorAll('.answer')[1]?.childElementCount > 1")
        page.press("Escape", 27)
        page.wait(STOPPED)
        assert served.engine.drawn_tokens < 100
        monkeypatch.undo()

        page.run(SEND.format(length=9999) + "document.getElementById('length').removeAttribute('max');"
                 "document.getElementById('ask').requestSubmit();")  # fmt: skip
        page.wait("document.querySelector('.error')?.textContent.includes('do not fit the context')")

        # An answer that ends inside of a character, whose last token still has its experts.
        experts = [[0, 1]] * CONFIG.model.num_layers
        cut = {"delta": {"content": "\ufffd"}, "experts": [{"bytes": [0xE2, 0x82], "experts": experts}]}
        event = json.dumps(f"data: {json.dumps({'choices': [cut]})}\n\ndata: [DONE]\n\n")
        page.run(f"window.fetch = async () => new Response({event});")
        page.run(SEND.format(length=9) + "document.getElementById('ask').requestSubmit();")
        page.wait(f"document.querySelectorAll('.answer').length > 2 && {STOPPED}")
        spans = page.run("return [...document.querySelectorAll('.answer span')].map(s => [s.textContent, s.experts])")
        assert spans[-1] == ["\ufffd", experts]
