"""The playground in a real browser, driven by keys and pointer: on a stub that fails as it is told, and on the server.

CHAMELEON_SCREENSHOTS=1 writes docs/serving/*.png; CHAMELEON_BUNDLE names the bundle that they show.
CHAMELEON_CHAT_BUNDLE names that of docs/serving/chat.png, and writes it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from chameleon_deploy.reference.checkpoint import Checkpoint
from tests.browser import SECONDS, Tab, launched, open_tab
from tests.commands import find_program
from tests.completion_server import CompletionServer, centroids, serve
from tests.conftest import REPOSITORY
from tests.serving import Running, running, wait_for
from tests.speaking_model import chat_source, speaking_bundle, system_for

FILES = REPOSITORY / "chameleon_deploy" / "serve" / "page"
SCREENSHOTS = REPOSITORY / "docs" / "serving"
MAX_SCREENSHOT = 150_000  # bytes
PHONE = {"width": 360, "height": 740}
VIEWS: dict[str, dict[str, Any]] = {
    "desktop": {}, "dark": {"color_scheme": "dark"}, "phone": {"viewport": PHONE, "is_mobile": True},
}  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {
    "type": "object", "properties": {"place": {"type": "string"}}}}}]  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with launched() as browser:
        yield browser


@pytest.fixture
def stub() -> Iterator[CompletionServer]:
    with serve() as stub:
        stub.files = FILES
        yield stub


@pytest.fixture
def tab(browser: Browser, stub: CompletionServer, request: pytest.FixtureRequest) -> Iterator[Tab]:
    """On the stub; the parameter, if any, names a view."""
    with open_tab(browser, f"{stub.url}/", **VIEWS[getattr(request, "param", "desktop")]) as tab:
        ready(tab.page)
        yield tab


@pytest.fixture
def page(tab: Tab) -> Page:
    return tab.page


def ready(page: Page) -> None:
    expect(page.locator("#map circle")).not_to_have_count(0)


def generate(page: Page, prompt: str = "The river", max_tokens: int = 8) -> None:
    page.fill("#prompt", prompt)
    page.fill("#max_tokens", str(max_tokens))
    page.press("#prompt", "Control+Enter")


def finished(page: Page, status: str = "Done.") -> None:
    expect(page.locator("#status")).to_have_text(status)


def tokens(page: Page, panel: str = "first") -> Locator:
    return page.locator(f"#{panel} [role=option]")


def open_chat(page: Page) -> None:
    page.click("nav a[href='#chat']")
    for seen in ("#message", "#system"):
        expect(page.locator(seen)).to_be_visible()
    for unseen in ("#outputs", "#prompt", "#clusters"):
        expect(page.locator(unseen)).to_be_hidden()


def open_completion(page: Page) -> None:
    page.click("nav a[href='#completion']")
    expect(page.locator("#chat")).to_be_hidden()
    expect(page.locator("#prompt")).to_be_visible()


def send(page: Page, message: str, status: str = "") -> None:
    """Send a message, or results, and wait until all have answered.

    status  what the page says then
    """
    page.fill("#message", message)
    page.press("#message", "Control+Enter")
    expect(page.locator("#status")).to_have_text(status or re.compile("Done|Stopped|Failed|results"))


def answers(page: Page, column: int = 0) -> list[str]:
    """The texts of the answers of one model."""
    found = page.locator(f".answers > article:nth-child({column + 1}) > .text > .tokens")
    return [text.removesuffix("∎") for text in found.all_text_contents()]


def written(page: Page) -> Locator:
    """The tokens of calls."""
    return page.locator(".written [role=option]")


def cells(page: Page, selector: str) -> list[list[str]]:
    """The texts of a table's rows."""
    return [row.locator("td, th").all_text_contents() for row in page.locator(selector).all()]


def test_the_page_at_rest(stub: CompletionServer, tab: Tab) -> None:
    options = tab.page.locator("#model option")
    assert [o.get_attribute("value") for o in options.all()] == ["stub", "stub:none", "stub:centroid"]
    expect(tab.page.locator("#live-rows")).to_have_text("3")
    expect(tab.page.locator("#live-queue")).to_have_text("2")
    assert tab.complaints == []
    assert {url for url in tab.requests if not url.startswith(f"{stub.url}/")} <= {"data:,"}


def test_the_policy_would_complain(browser: Browser, stub: CompletionServer, tmp_path: Path) -> None:
    """Of an inline script, an inline style and a picture from elsewhere."""
    stub.files = shutil.copytree(FILES, tmp_path / "page")
    index = stub.files / "index.html"
    faults = ("<script>document.title = 'run'</script>", "<p style='color: red'>",
              "<img src='http://127.0.0.1:9/picture.png' alt=''>")  # fmt: skip
    index.write_text(index.read_text("utf-8").replace("</main>", "".join(faults) + "</main>"), "utf-8")
    with open_tab(browser, f"{stub.url}/") as tab:
        ready(tab.page)
        assert tab.page.title() == "Chameleon playground"
        assert len([text for text in tab.complaints if "Content Security Policy" in text]) == len(faults)


def test_type_and_stream(stub: CompletionServer, tab: Tab) -> None:
    stub.hold_at, page = 2, tab.page
    generate(page, "It's a “river”", 12)
    tokens(page).nth(1).wait_for()
    assert tokens(page).count() == 2  # shown as they come, not at the end
    expect(page.locator("#generate")).to_be_disabled()
    stub.go_on.set()
    finished(page)
    words = [f" word{i}" for i in range(12)]
    assert tokens(page).all_text_contents() == words
    assert page.inner_text("#first .text") == "It's a “river”" + "".join(words)
    (body,) = stub.bodies
    assert body == {"model": "stub", "prompt": "It's a “river”", "max_tokens": 12, "temperature": 0.8, "top_p": 1,
                    "seed": 0, "logprobs": 5, "stream": True,
                    "stream_options": {"include_usage": True}}  # fmt: skip
    levels = [token.get_attribute("data-level") for token in tokens(page).all()]
    assert levels[:7] == ["0", "2", "3", "4", "4", "5", "5"]  # of -0.1, -1.1, ..., -6.1
    assert "12 tokens" in page.inner_text("#first .about")
    assert "48 tokens cached" in page.inner_text("#first .about")
    assert "length" in page.inner_text("#first .about")
    assert tab.complaints == []


@pytest.mark.parametrize("by", ["button", "key"])
def test_stop(stub: CompletionServer, page: Page, by: str) -> None:
    stub.hold_at = 3
    generate(page, max_tokens=500)
    tokens(page).nth(2).wait_for()
    page.click("#cancel") if by == "button" else page.keyboard.press("Escape")
    finished(page, "Stopped.")
    expect(page.locator("#generate")).to_be_enabled()
    wait_for(lambda: stub.gone)  # the server's side has ended too
    assert tokens(page).count() == 3
    assert page.text_content("#error") == ""


def test_alternatives_by_pointer(page: Page) -> None:
    generate(page)
    finished(page)
    expect(page.locator("#alternatives")).to_be_hidden()
    tokens(page).nth(1).hover()
    assert cells(page, "#alternatives tr") == [["␣word1", "33 %"], ["␣other0", "14 %"], ["␣other1", "5.0 %"],
                                               ["␣other2", "1.8 %"], ["␣other3", "0.67 %"]]  # fmt: skip
    page.hover("#prompt")
    expect(page.locator("#alternatives")).to_be_hidden()


def test_alternatives_by_keyboard(page: Page) -> None:
    generate(page)
    finished(page)
    page.focus("#python")
    for key, expected in (("Tab", " word0"), ("ArrowRight", " word1"), ("End", " word7"), ("ArrowLeft", " word6"),
                          ("Home", " word0")):  # fmt: skip
        page.keyboard.press(key)
        focused = page.locator(":focus")
        assert focused.text_content() == expected
        found = cells(page, "#alternatives tr")
        assert len(found) == 5
        assert any(name.strip("␣") == expected.strip() for name, _ in found)
        assert focused.get_attribute("aria-describedby") == "alternatives"
    page.keyboard.press("Escape")
    expect(page.locator("#alternatives")).to_be_hidden()


def test_the_whole_page_by_keyboard(page: Page) -> None:
    """Tab reaches every control."""
    reached = set()
    for _ in range(25):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert reached >= {"prompt", "model", "beside", "max_tokens", "temperature", "top_p", "seed", "SUMMARY",
                       "generate", "curl", "python"}  # fmt: skip


def test_switch_mode(stub: CompletionServer, page: Page) -> None:
    page.press("#model", "ArrowDown")
    expect(page.locator("#model")).to_have_value("stub:none")
    generate(page)
    finished(page)
    assert stub.bodies[-1]["model"] == "stub:none"
    assert page.inner_text("#first-title") == "stub:none"


def test_two_models_beside_each_other(stub: CompletionServer, page: Page) -> None:
    stub.hold_at = 1
    page.select_option("#beside", "stub:none")
    generate(page)
    for panel in ("first", "second"):  # both at the same time
        tokens(page, panel).first.wait_for()
    stub.go_on.set()
    finished(page)
    assert sorted(body["model"] for body in stub.bodies) == ["stub", "stub:none"]
    first, second = ({**body, "model": ""} for body in stub.bodies)
    assert first == second
    assert tokens(page).count() == tokens(page, "second").count() == 8
    page.select_option("#beside", "")
    generate(page)
    finished(page)
    expect(page.locator("#second")).to_be_hidden()


def test_copy_as_curl_runs(stub: CompletionServer, page: Page) -> None:
    page.fill("#prompt", "It's \"5 o'clock\"\n$HOME `x` \\ é")
    page.click("summary")
    page.fill("#stop", "a\n\n b")
    page.click("#curl")
    finished(page, "Copied.")
    command = page.evaluate("navigator.clipboard.readText()")
    assert command == page.input_value("#command")
    answer = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True, timeout=30)
    assert json.loads(answer.stdout)["object"] == "text_completion"
    assert stub.bodies[-1]["prompt"] == "It's \"5 o'clock\"\n$HOME `x` \\ é"
    assert stub.bodies[-1]["stop"] == ["a", " b"]
    open_chat(page)
    page.fill("#message", "It's")
    page.click("#curl")
    answer = subprocess.run(["sh", "-c", page.input_value("#command")], capture_output=True, text=True, check=True)
    assert json.loads(answer.stdout)["object"] == "chat.completion"
    assert stub.bodies[-1]["messages"] == [{"role": "user", "content": "It's"}]


def test_copy_as_python_runs(stub: CompletionServer, page: Page, tmp_path: Path) -> None:
    """Against a module that keeps what it is called with."""
    (tmp_path / "openai.py").write_text(
        "import json, types\n"
        "class OpenAI:\n"
        "    def __init__(self, **settings):\n"
        "        self.completions = types.SimpleNamespace(create=lambda **call: types.SimpleNamespace(\n"
        "            choices=[types.SimpleNamespace(text=json.dumps([settings, call]), message=json.dumps(call))]))\n"
        "        self.chat = self\n"
    )
    page.click("summary")
    page.fill("#key", "secret")
    page.fill("#top_k", "7")
    page.fill("#prompt", "It's \"5 o'clock\"\n\\ é")
    page.click("#python")
    program = page.input_value("#command")
    assert "secret" not in program
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OPENAI_API_KEY": "mine"}
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=30,
                            env=environment)  # fmt: skip
    settings, call = json.loads(answer.stdout)
    assert settings == {"base_url": f"{stub.url}/v1", "api_key": "mine"}
    assert call == {"model": "stub", "prompt": "It's \"5 o'clock\"\n\\ é", "max_tokens": 64, "temperature": 0.8,
                    "top_p": 1, "seed": 0, "logprobs": 5, "extra_body": {"top_k": 7}}  # fmt: skip
    page.fill("#top_k", "")
    open_chat(page)
    page.fill("#message", "It's")
    page.click("#forms summary")
    page.fill("#tools", json.dumps([{**TOOLS[0], "strict": True, "extra": None}]))
    page.click("#python")
    answer = subprocess.run([sys.executable, "-c", page.input_value("#command")], capture_output=True, text=True,
                            check=True, timeout=30, env=environment)  # fmt: skip
    assert json.loads(answer.stdout) == {
        "model": "stub", "messages": [{"role": "user", "content": "It's"}], "temperature": 0.8, "top_p": 1, "seed": 0,
        "logprobs": True, "top_logprobs": 5, "tools": [{**TOOLS[0], "strict": True, "extra": None}],
        "tool_choice": "auto",
    }  # fmt: skip


def test_adapters_and_their_use(page: Page) -> None:
    """Nothing is shown before one was used."""
    expect(page.locator("#adapters")).to_be_hidden()
    generate(page)
    finished(page)
    expect(page.locator("#adapters")).to_be_visible()
    assert cells(page, "#adapters tbody tr") == [
        ["(others)", "9", "40", "-", "-"], ["code", "3", "12", "100.0 ms", "10.0 ms"]
    ]  # fmt: skip


def test_the_map_and_the_distances(page: Page) -> None:
    for prompt in ("four", "three", "two letters"):
        generate(page, prompt, 1)
        finished(page)
        expect(page.locator("#map .now title")).to_have_text(f"prompt in cluster {len(prompt) % 4}")
    assert page.locator("#map .centroid").count() == 4
    assert page.locator("#map .prompt").count() == 3
    rows = cells(page, "#distances tbody tr")
    assert rows[0][0] == "3"
    assert [float(distance) for _, distance, _ in rows] == sorted(float(distance) for _, distance, _ in rows)
    assert "cluster 3" in (page.get_attribute("#map", "aria-label") or "")


def test_the_map_is_a_principal_component_analysis(page: Page) -> None:
    project = "(points) => import('/clusters.js').then((map) => map.project(points))"
    points = np.random.default_rng(0).normal(size=(9, 12)) * np.geomspace(5, 0.1, 12)
    u, s, _ = np.linalg.svd(points - points.mean(0), full_matrices=False)
    found = page.evaluate(project, points.tolist())
    np.testing.assert_allclose(np.abs(found), np.abs(u[:, :2] * s[:2]), rtol=1e-3, atol=1e-3)
    assert page.evaluate(project, centroids()[:1]) == [[0, 0]]


@pytest.mark.parametrize(
    ("fault", "message"),
    [({"fail": 1}, "429: code_429: the queue is full"), ({"break_at": 3}, "ended early|network|reached"),
     ({"api_key": "k"}, "401: code_401: the API key")],
)  # fmt: skip
def test_errors_are_shown(stub: CompletionServer, page: Page, fault: dict[str, Any], message: str) -> None:
    vars(stub).update(fault)
    generate(page)
    finished(page, "Failed.")
    shown = page.inner_text("#error")
    assert any(part in shown for part in message.split("|")), shown
    assert "failed" in page.inner_text("#first .about")
    vars(stub).update(fail=0, break_at=0, api_key="")
    generate(page)
    finished(page)
    assert page.text_content("#error") == ""


def test_an_api_key_is_asked_for_sent_and_not_kept(browser: Browser, stub: CompletionServer) -> None:
    stub.api_key = "k"
    with open_tab(browser, f"{stub.url}/") as tab:
        page = tab.page
        expect(page.locator("#error")).to_contain_text("401")
        page.fill("#key", "k")  # the page has opened its settings
        page.keyboard.press("Tab")
        expect(page.locator("#model option")).not_to_have_count(0)
        expect(page.locator("#error")).to_be_hidden()
        generate(page)
        finished(page)
        assert page.evaluate("localStorage.length + sessionStorage.length + document.cookie.length") == 0


def test_a_server_that_is_gone(stub: CompletionServer, page: Page) -> None:
    stub.shutdown()
    stub.server_close()
    generate(page)
    expect(page.locator("#error")).to_have_text("The server cannot be reached.")
    expect(page.locator("#live-rows")).to_have_text("-")


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def test_a_conversation(stub: CompletionServer, tab: Tab) -> None:
    stub.hold_at, page = 3, tab.page
    open_chat(page)
    page.fill("#message", "one")
    page.press("#message", "Control+Enter")
    page.locator(".answers [role=option]").nth(1).wait_for()
    assert answers(page) == ["stub word1"]  # shown as it comes
    expect(page.locator("#send")).to_be_disabled()
    stub.go_on.set()
    finished(page)
    page.fill("#system", "Be short.")
    send(page, "two")
    said = "stub word1 word2 word3"
    assert answers(page) == [said, said]
    assert page.locator(".user .text").all_text_contents() == ["one", "two"]
    first, second = (body.pop("messages") for body in stub.bodies)
    assert first == [user("one")]
    assert second == [{"role": "system", "content": "Be short."}, user("one"), assistant(said), user("two")]
    assert stub.bodies == [{"model": "stub", "temperature": 0.8, "top_p": 1, "seed": 0, "logprobs": True,
                            "top_logprobs": 5, "stream": True,
                            "stream_options": {"include_usage": True}}] * 2  # fmt: skip
    shown = page.locator(".answers [role=option]")
    assert [token.get_attribute("data-level") for token in shown.all()] == ["0", "2", "3", "4"] * 2
    shown.nth(1).hover()
    assert cells(page, "#alternatives tr") == [["␣word1", "33 %"], ["␣other0", "14 %"], ["␣other1", "5.0 %"],
                                               ["␣other2", "1.8 %"], ["␣other3", "0.67 %"]]  # fmt: skip
    assert "4 tokens" in page.locator(".answers .about").first.inner_text()
    page.click("#clear")
    assert page.locator("#turns > *").count() == 0
    send(page, "", "Write a message.")
    assert len(stub.bodies) == 2
    assert tab.complaints == []


@pytest.mark.parametrize("by", ["button", "key"])
def test_stop_an_answer(stub: CompletionServer, page: Page, by: str) -> None:
    stub.hold_at = 3
    open_chat(page)
    page.fill("#message", "one")
    page.click("#send")
    page.locator(".answers [role=option]").nth(1).wait_for()
    page.click("#stop-answer") if by == "button" else page.keyboard.press("Escape")
    finished(page, "Stopped.")
    wait_for(lambda: stub.gone)
    stub.go_on.set()
    send(page, "two")
    assert stub.bodies[-1]["messages"] == [user("one"), assistant("stub word1"), user("two")]


def test_regenerate(stub: CompletionServer, page: Page) -> None:
    open_chat(page)
    send(page, "one")
    page.click("#regenerate")
    wait_for(lambda: len(stub.bodies) == 2)
    finished(page)
    assert [body["seed"] for body in stub.bodies] == [0, 1]
    assert stub.bodies[1]["messages"] == [user("one")]
    assert len(answers(page)) == 1


def test_edit(stub: CompletionServer, page: Page) -> None:
    open_chat(page)
    for message in ("one", "two", "three"):
        send(page, message)
    edit = page.locator(".edit").nth(1)
    edit.click()
    expect(page.locator("#message")).to_have_value("two")
    assert page.locator(".replaced").count() == 4  # both later messages, with their answers
    edit.click()
    expect(page.locator("#message")).to_have_value("")
    assert page.locator(".replaced").count() == 0
    edit.click()
    send(page, "2")
    assert page.locator(".user .text").all_text_contents() == ["one", "2"]
    assert page.locator(".replaced").count() == 0
    assert stub.bodies[-1]["messages"] == [user("one"), assistant("stub word1 word2 word3"), user("2")]


def test_one_conversation_with_two_models(stub: CompletionServer, page: Page) -> None:
    open_chat(page)
    send(page, "one")
    page.select_option("#beside", "stub:none")
    stub.hold_at = 2
    page.fill("#message", "two")
    page.press("#message", "Control+Enter")
    for column in (1, 2):  # both at the same time
        page.locator(f".answers >> nth=1 >> article:nth-child({column}) [role=option]").wait_for()
    stub.go_on.set()
    finished(page)
    send(page, "three")
    assert answers(page)[1:] == ["stub word1 word2 word3"] * 2
    assert answers(page, 1) == ["stub:none word1 word2 word3"] * 2
    second, first = sorted(stub.bodies[-2:], key=lambda body: body["model"], reverse=True)
    before = [user("one"), assistant("stub word1 word2 word3"), user("two")]
    assert first["messages"] == [*before, assistant("stub word1 word2 word3"), user("three")]
    assert second["messages"] == [*before, assistant("stub:none word1 word2 word3"), user("three")]


def test_tools_and_their_results(stub: CompletionServer, page: Page) -> None:
    open_chat(page)
    page.select_option("#beside", "stub:none")
    page.click("#forms summary")
    page.fill("#tools", "[{")
    page.fill("#message", "Weather?")
    page.click("#send")
    expect(page.locator("#error")).to_contain_text("The tools field is not JSON")
    assert stub.bodies == []
    expect(page.locator("#message")).to_have_value("Weather?")
    page.fill("#tools", json.dumps(TOOLS))
    page.fill("#schema", '{"type": "object"}')
    send(page, "Weather?")
    assert all(body["tools"] == TOOLS and body["tool_choice"] == "auto" for body in stub.bodies)
    schema = {"name": "answer", "schema": {"type": "object"}, "strict": True}
    assert stub.bodies[0]["response_format"] == {"type": "json_schema", "json_schema": schema}
    assert page.locator(".called").all_text_contents() == ['weather({"place": "Rome"})'] * 2
    assert written(page).all_text_contents() == ["{call", "}"] * 2
    written(page).first.hover()
    assert len(cells(page, "#alternatives tr")) == 5
    page.get_by_label("Its result").nth(1).fill("Rain")
    send(page, "")
    for body in stub.bodies[-2:]:
        answer, result = body["messages"][1:]
        function = {"name": "weather", "arguments": '{"place": "Rome"}'}
        assert answer["tool_calls"] == [{"id": "call1", "type": "function", "function": function}]
        content = "Rain" if body["model"] == "stub:none" else ""
        assert result == {"role": "tool", "tool_call_id": "call1", "content": content}
    assert answers(page, 1)[-1] == "stub:none word1 word2 word3"


def test_an_answer_that_failed_is_no_part_of_the_conversation(stub: CompletionServer, page: Page) -> None:
    open_chat(page)
    stub.fail = 1
    send(page, "one", "Failed.")
    expect(page.locator("#error")).to_have_text("429: code_429: the queue is full")
    stub.fail = 0
    page.click("#regenerate")
    finished(page)
    assert len(answers(page)) == 1
    stub.fail = 1
    send(page, "two", "Failed.")
    stub.fail = 0
    send(page, "three")
    assert stub.bodies[-1]["messages"] == [
        user("one"), assistant("stub word1 word2 word3"), user("two"), user("three")
    ]  # fmt: skip


@pytest.fixture(scope="session")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The source of axe-core, installed by npm."""
    npm = find_program("npm", install="apt-get install npm")
    directory = tmp_path_factory.mktemp("axe")
    options = ["--no-audit", "--no-fund", "--ignore-scripts"]
    subprocess.run([npm, "install", "--prefix", str(directory), *options, "axe-core@4"], check=True,
                   capture_output=True, timeout=300)  # fmt: skip
    return (directory / "node_modules" / "axe-core" / "axe.min.js").read_text("utf-8")


def faults(page: Page, axe: str) -> list[str]:
    """Serious and critical ones."""
    page.evaluate(axe)
    violations = page.evaluate("axe.run().then((r) => r.violations)")
    return [
        f"{fault['id']}: {node['html']}" for fault in violations if fault["impact"] in ("serious", "critical")
        for node in fault["nodes"]
    ]  # fmt: skip


@pytest.mark.parametrize("tab", VIEWS, indirect=True)
def test_accessibility(page: Page, axe: str) -> None:
    assert faults(page, axe) == []
    page.click("summary")
    page.select_option("#beside", "stub:none")
    generate(page)
    finished(page)
    page.click("#curl")
    tokens(page).nth(1).hover()
    assert faults(page, axe) == []
    open_chat(page)
    page.click("#forms summary")
    page.fill("#tools", json.dumps(TOOLS))
    send(page, "Hello")
    written(page).nth(1).hover()
    assert faults(page, axe) == []
    open_completion(page)
    page.evaluate("document.querySelector('label[for=prompt]').remove()")
    assert [fault.partition(":")[0] for fault in faults(page, axe)] == ["label"]  # it would have seen one


@pytest.mark.parametrize("tab", ["phone"], indirect=True)
def test_phone_width(page: Page) -> None:
    page.select_option("#beside", "stub:none")
    generate(page, "word" * 60, 40)
    finished(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    boxes = [page.locator(f"#{panel}").bounding_box() for panel in ("first", "second")]
    assert boxes[0] and boxes[1] and boxes[0]["x"] == boxes[1]["x"]  # one below the other
    open_chat(page)
    page.click("#forms summary")
    page.fill("#tools", json.dumps(TOOLS))
    send(page, "word" * 60)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]


def test_dark_mode(tab: Tab) -> None:
    brightness = [tab.pixels().mean()]
    tab.page.emulate_media(color_scheme="dark")
    brightness.append(tab.pixels().mean())
    assert brightness[0] > 200 > 60 > brightness[1]


def test_on_the_server(browser: Browser, server: Running) -> None:
    with open_tab(browser, f"{server.url}/") as tab:
        page = tab.page
        ready(page)
        generate(page, "The river", 40)
        finished(page)
        body = {"model": server.name, "prompt": "The river", "max_tokens": 40, "temperature": 0.8, "seed": 0}
        answer = server.post("/v1/completions", **body).json()
        (choice,) = answer["choices"]
        assert page.text_content("#first .text") == "The river" + choice["text"]
        assert f"cluster {choice['chameleon']['cluster_id']}" in page.inner_text("#first .about")
        assert f"{answer['usage']['completion_tokens']} tokens" in page.inner_text("#first .about")
        tokens(page).first.hover()
        assert len(cells(page, "#alternatives tr")) >= 5

        page.select_option("#beside", f"{server.name}:none")
        generate(page, "The river", 12)
        finished(page)
        assert page.inner_text("#second-title") == f"{server.name}:none"
        assert tokens(page).count()
        assert tokens(page, "second").count()
        page.locator("#map .now").wait_for()
        (item,) = server.post("/v1/adapt", input="The river").json()["data"]
        cluster, distance, _ = cells(page, "#distances tbody tr")[0]
        assert int(cluster) == item["cluster_id"]
        assert float(distance) == pytest.approx(min(item["distances"]), abs=1e-4)
        expect(page.locator("#live-rows")).to_have_text("0")

        page.click("#curl")
        command = page.input_value("#command")
        copied = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True, timeout=30)
        assert json.loads(copied.stdout)["model"] == server.name
        generate(page, "The river", 100)
        page.keyboard.press("Escape")
        wait_for(lambda: page.inner_text("#status") in ("Stopped.", "Done."))
        server.wait_until_idle()
        assert tab.complaints == []

        generate(page, "word " * 500)
        finished(page, "Failed.")
        assert "400: text_too_long" in page.inner_text("#error")


def test_a_conversation_on_the_server(browser: Browser, mini: Checkpoint, tmp_path: Path) -> None:
    call = '<tool_call>\n{"name": "weather", "arguments": {"place": "Rome"}}\n</tool_call>'
    says = ["The river.", f"I look.\n{call}", "It is sunny."]
    speaking_bundle(says, mini.trunk.tokenizer, tmp_path / "bundle", chat_source())
    with running(tmp_path / "bundle", rows=4, mode="none") as server, open_tab(browser, f"{server.url}/#chat") as tab:
        page, template = tab.page, server.runtime.chat_template
        expect(page.locator("#model option")).not_to_have_count(0)
        page.fill("#temperature", "0")
        page.select_option("#beside", f"{server.name}:none")
        page.click("#forms summary")
        page.fill("#tools", json.dumps(TOOLS))
        page.fill("#system", system_for(1, template, [user("Hello")], TOOLS))
        send(page, "Hello")
        assert page.locator(".called").all_text_contents() == ['weather({"place": "Rome"})'] * 2
        assert "".join(written(page).all_text_contents()).count("<tool_call>") == 2
        function = {"name": "weather", "arguments": '{"place": "Rome"}'}
        called = {**assistant("I look."), "tool_calls": [{"id": "x", "type": "function", "function": function}]}
        result = {"role": "tool", "tool_call_id": "x", "content": "Sun"}
        page.fill("#system", system_for(2, template, [user("Hello"), called, result], TOOLS))
        for field in page.get_by_label("Its result").all():
            field.fill("Sun")
        send(page, "", "Done.")
        assert answers(page)[-1] == answers(page, 1)[-1] == "It is sunny."
        page.locator(".answers [role=option]").last.hover()
        assert cells(page, "#alternatives tr")
        assert tab.complaints == []


def test_a_schema_on_the_server(browser: Browser, mini: Checkpoint, tmp_path: Path) -> None:
    speaking_bundle(["The river."], mini.trunk.tokenizer, tmp_path / "bundle", chat_source())
    schema = {"type": "object", "properties": {"sky": {"enum": ["blue"]}}, "required": ["sky"]}
    with running(tmp_path / "bundle", mode="none") as server, open_tab(browser, f"{server.url}/#chat") as tab:
        page = tab.page
        expect(page.locator("#model option")).not_to_have_count(0)
        page.fill("#temperature", "0")
        page.click("#forms summary")
        page.fill("#schema", json.dumps({**schema, "additionalProperties": False}))
        send(page, "Hello")
        assert json.loads(answers(page)[-1]) == {"sky": "blue"}
        page.fill("#schema", json.dumps({"$ref": "https://example.org/schema"}))
        page.fill("#message", "Hello")
        page.click("#send")
        expect(page.locator("#error")).to_contain_text("400")
        assert ["400" in complaint for complaint in tab.complaints] == [True]  # the browser's own, of the status


@pytest.mark.skipif(not os.environ.get("CHAMELEON_SCREENSHOTS"), reason="CHAMELEON_SCREENSHOTS=1 writes them")
@pytest.mark.parametrize("view", VIEWS)
def test_screenshots(browser: Browser, bundle: Path, view: str) -> None:
    SCREENSHOTS.mkdir(exist_ok=True)
    with (
        running(Path(os.environ.get("CHAMELEON_BUNDLE", bundle))) as server,
        open_tab(browser, f"{server.url}/", **VIEWS[view]) as tab,
    ):
        page, file = tab.page, SCREENSHOTS / f"{view}.png"
        ready(page)
        for prompt in ("def read(path):", "The museum is open", "import os, sys", "A list of"):
            generate(page, prompt, 1)
            finished(page)
        page.select_option("#beside", f"{server.name}:none")
        generate(page, "The river", 32)
        finished(page)
        tokens(page).nth(4).hover()
        page.screenshot(path=file, full_page=True)
        assert file.stat().st_size < MAX_SCREENSHOT


@pytest.mark.skipif(not os.environ.get("CHAMELEON_CHAT_BUNDLE"), reason="CHAMELEON_CHAT_BUNDLE names a bundle")
def test_screenshot_of_a_conversation(browser: Browser) -> None:
    with (
        running(Path(os.environ["CHAMELEON_CHAT_BUNDLE"]), rows=1, capacity=1024) as server,
        open_tab(browser, f"{server.url}/#chat", viewport={"width": 1280, "height": 720}) as tab,
    ):
        page, file = tab.page, SCREENSHOTS / "chat.png"
        expect(page.locator("#model option")).not_to_have_count(0)
        expect.set_options(timeout=300_000)
        page.fill("#system", "Answer in one line, without explanation.")
        send(page, "Write one line of Python that reverses a list.")
        send(page, "And a text?")
        expect.set_options(timeout=SECONDS * 1000)
        written = page.locator(".answers [role=option]")
        written.nth(written.count() - 4).hover()
        page.screenshot(path=file, full_page=True)
        assert file.stat().st_size < MAX_SCREENSHOT
