"""The playground in a real browser, driven by keys and pointer: on a stub that fails as it is told, and on the server.

CHAMELEON_SCREENSHOTS=1 writes docs/serving/*.png; CHAMELEON_BUNDLE names the bundle that they show.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.browser import Tab, find_chromium, find_program, open_tab, read_pixels
from tests.completion_server import CompletionServer, centroids, serve
from tests.conftest import REPOSITORY
from tests.serving import Running, running, wait_for

FILES = REPOSITORY / "chameleon_deploy" / "serve" / "page"
SCREENSHOTS = REPOSITORY / "docs" / "serving"
MAX_SCREENSHOT = 150_000  # bytes
PHONE = (360, 740)
VIEWS = (("desktop", False, (1280, 900)), ("dark", True, (1280, 900)), ("phone", False, PHONE))  # name, dark, size
CTRL = 2
DONE = "document.querySelector('#status').textContent === 'Done.'"


@pytest.fixture
def stub() -> Iterator[CompletionServer]:
    with serve() as stub:
        stub.files = FILES
        yield stub


@pytest.fixture
def tab(stub: CompletionServer, tmp_path: Path) -> Iterator[Tab]:
    with open_tab(find_chromium(), stub.url + "/", tmp_path) as tab:
        tab.wait("document.querySelector('#map circle')")
        yield tab


def generate(tab: Tab, prompt: str = "The river", max_tokens: int = 8) -> None:
    tab.write("#prompt", prompt)
    tab.write("#max_tokens", str(max_tokens))
    tab.value("document.querySelector('#prompt').focus()")
    tab.key("Enter", CTRL)


def tokens(tab: Tab, panel: str = "first") -> list[str]:
    return list(tab.value(f"[...document.querySelectorAll('#{panel} [role=option]')].map((e) => e.textContent)"))


def test_the_page_at_rest(stub: CompletionServer, tab: Tab) -> None:
    assert tab.value("[...document.querySelector('#model').options].map((o) => o.value)") == [
        "stub", "stub:none", "stub:centroid",
    ]  # fmt: skip
    tab.wait("document.querySelector('#live-rows').textContent === '3'")
    assert tab.text("#live-queue") == "2"
    assert tab.complaints == []
    assert {url for url in tab.requests if not url.startswith(f"{stub.url}/")} <= {"data:,"}


def test_the_policy_would_complain(stub: CompletionServer, tmp_path: Path) -> None:
    """Of an inline script, an inline style and a picture from elsewhere."""
    stub.files = shutil.copytree(FILES, tmp_path / "page")
    index = stub.files / "index.html"
    faults = ("<script>document.title = 'run'</script>", "<p style='color: red'>",
              "<img src='http://127.0.0.1:9/picture.png' alt=''>")  # fmt: skip
    index.write_text(index.read_text("utf-8").replace("</main>", "".join(faults) + "</main>"), "utf-8")
    with open_tab(find_chromium(), stub.url + "/", tmp_path) as tab:
        tab.wait("document.querySelector('#map circle')")
        assert tab.value("document.title") == "Chameleon playground"
        assert len([text for text in tab.complaints if "Content Security Policy" in text]) == len(faults)


def test_type_and_stream(stub: CompletionServer, tab: Tab) -> None:
    stub.pause = 0.1
    generate(tab, "It's a “river”", 12)
    tab.wait("document.querySelectorAll('#first [role=option]').length >= 2")
    assert len(tokens(tab)) < 12  # shown as they come, not at the end
    assert tab.value("document.querySelector('#generate').disabled")
    tab.wait(DONE)
    assert tokens(tab) == [f" word{i}" for i in range(12)]
    assert tab.text("#first .text") == "It's a “river”" + "".join(tokens(tab))
    (body,) = stub.bodies
    assert body == {"model": "stub", "prompt": "It's a “river”", "max_tokens": 12, "temperature": 0.8, "top_p": 1,
                    "seed": 0, "logprobs": 5, "stream": True}  # fmt: skip
    levels = tab.value("[...document.querySelectorAll('#first [role=option]')].map((e) => e.dataset.level)")
    assert levels[:7] == ["0", "2", "3", "4", "4", "5", "5"]  # of -0.1, -1.1, ..., -6.1
    assert "12 tokens" in tab.text("#first .about")
    assert "length" in tab.text("#first .about")
    assert tab.complaints == []


@pytest.mark.parametrize("by", ["button", "key"])
def test_stop(stub: CompletionServer, tab: Tab, by: str) -> None:
    stub.pause = 0.05
    generate(tab, max_tokens=500)
    tab.wait("document.querySelectorAll('#first [role=option]').length >= 3")
    if by == "button":
        tab.click("#cancel")
    else:
        tab.key("Escape")
    tab.wait("document.querySelector('#status').textContent === 'Stopped.'")
    shown = len(tokens(tab))
    assert 3 <= shown < 100
    tab.wait("!document.querySelector('#generate').disabled")
    wait_for(lambda: stub.gone)  # the server's side has ended too
    assert len(tokens(tab)) == shown
    assert tab.text("#error") == ""


def alternatives(tab: Tab) -> list[list[str]] | None:
    if tab.value("document.querySelector('#alternatives').hidden"):
        return None
    return list(tab.value(
        "[...document.querySelectorAll('#alternatives tr')].map((r) => [...r.cells].map((c) => c.textContent))"
    ))  # fmt: skip


def test_alternatives_by_pointer(tab: Tab) -> None:
    generate(tab)
    tab.wait(DONE)
    assert alternatives(tab) is None
    tab.point("#first [role=option]:nth-child(2)")
    assert alternatives(tab) == [["␣word1", "33 %"], ["␣other0", "14 %"], ["␣other1", "5.0 %"], ["␣other2", "1.8 %"],
                                 ["␣other3", "0.67 %"]]  # fmt: skip
    tab.point("#prompt")
    assert alternatives(tab) is None


def test_alternatives_by_keyboard(tab: Tab) -> None:
    generate(tab)
    tab.wait(DONE)
    tab.value("document.querySelector('#python').focus()")
    tab.key("Tab")
    assert tab.value("document.activeElement.textContent") == " word0"
    for key, expected in (("ArrowRight", " word1"), ("End", " word7"), ("ArrowLeft", " word6"), ("Home", " word0")):
        tab.key(key)
        assert tab.value("document.activeElement.textContent") == expected
        found = alternatives(tab)
        assert found is not None
        assert len(found) == 5
        assert any(name.strip("␣") == expected.strip() for name, _ in found)
    described = tab.value("document.activeElement.getAttribute('aria-describedby')")
    assert described == "alternatives"
    tab.key("Escape")
    assert alternatives(tab) is None


def test_the_whole_page_by_keyboard(tab: Tab) -> None:
    """Tab reaches every control."""
    reached = set()
    tab.value("document.activeElement.blur()")
    for _ in range(25):
        tab.key("Tab")
        reached.add(tab.value("document.activeElement.id || document.activeElement.tagName"))
    assert reached >= {"prompt", "model", "max_tokens", "temperature", "top_p", "seed", "SUMMARY", "compare",
                       "generate", "curl", "python"}  # fmt: skip


def test_switch_mode(stub: CompletionServer, tab: Tab) -> None:
    tab.value("document.querySelector('#model').focus()")
    tab.key("ArrowDown")
    assert tab.value("document.querySelector('#model').value") == "stub:none"
    assert tab.text("#compare-label") == "stub beside it"
    generate(tab)
    tab.wait(DONE)
    assert stub.bodies[-1]["model"] == "stub:none"
    assert tab.text("#first-title") == "stub:none"


def test_compare_with_the_base(stub: CompletionServer, tab: Tab) -> None:
    stub.pause = 0.1
    tab.click("#compare")
    generate(tab)
    tab.wait("['first', 'second'].every((id) => document.querySelector(`#${id} [role=option]`))")  # at the same time
    assert not tab.value(DONE)
    tab.wait(DONE)
    assert sorted(body["model"] for body in stub.bodies) == ["stub", "stub:none"]
    first, second = ({**body, "model": ""} for body in stub.bodies)
    assert first == second
    assert len(tokens(tab)) == len(tokens(tab, "second")) == 8
    tab.click("#compare")
    generate(tab)
    tab.wait(DONE)
    assert tab.value("document.querySelector('#second').hidden")


def test_copy_as_curl_runs(stub: CompletionServer, tab: Tab) -> None:
    tab.write("#prompt", "It's \"5 o'clock\"\n$HOME `x` \\ é")
    tab.value("document.querySelector('#stop').value = 'a\\n\\n b'")
    tab.click("#curl")
    tab.wait("document.querySelector('#status').textContent === 'Copied.'")
    command = tab.value("navigator.clipboard.readText()")
    assert command == tab.value("document.querySelector('#command').value")
    answer = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True, timeout=30)
    assert json.loads(answer.stdout)["object"] == "text_completion"
    assert stub.bodies[-1]["prompt"] == "It's \"5 o'clock\"\n$HOME `x` \\ é"
    assert stub.bodies[-1]["stop"] == ["a", " b"]


def test_copy_as_python_runs(stub: CompletionServer, tab: Tab, tmp_path: Path) -> None:
    """Against a module that keeps what it is called with."""
    (tmp_path / "openai.py").write_text(
        "import json, types\n"
        "class OpenAI:\n"
        "    def __init__(self, **settings):\n"
        "        self.completions = types.SimpleNamespace(create=lambda **call: types.SimpleNamespace(\n"
        "            choices=[types.SimpleNamespace(text=json.dumps([settings, call]))]))\n"
    )
    tab.value("document.querySelector('#key').value = 'secret'")
    tab.value("document.querySelector('#top_k').value = '7'")
    tab.write("#prompt", "It's \"5 o'clock\"\n\\ é")
    tab.click("#python")
    program = tab.value("document.querySelector('#command').value")
    assert "secret" not in program
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=30,
                            env={**os.environ, "PYTHONPATH": str(tmp_path), "OPENAI_API_KEY": "mine"})  # fmt: skip
    settings, call = json.loads(answer.stdout)
    assert settings == {"base_url": f"{stub.url}/v1", "api_key": "mine"}
    assert call == {"model": "stub", "prompt": "It's \"5 o'clock\"\n\\ é", "max_tokens": 64, "temperature": 0.8,
                    "top_p": 1, "seed": 0, "logprobs": 5, "extra_body": {"top_k": 7}}  # fmt: skip


def test_the_map_and_the_distances(tab: Tab) -> None:
    for prompt in ("four", "three", "two letters"):
        generate(tab, prompt, 1)
        tab.wait(DONE)
        tab.wait(f"document.querySelector('#map .now title')?.textContent === 'prompt in cluster {len(prompt) % 4}'")
    assert tab.value("document.querySelectorAll('#map .centroid').length") == 4
    assert tab.value("document.querySelectorAll('#map .prompt').length") == 3
    rows = tab.value(
        "[...document.querySelectorAll('#distances tbody tr')].map((r) => [...r.cells].map((c) => c.innerText))"
    )
    assert rows[0][0] == "3"
    assert [float(distance) for _, distance, _ in rows] == sorted(float(distance) for _, distance, _ in rows)
    assert "cluster 3" in tab.value("document.querySelector('#map').getAttribute('aria-label')")


def test_the_map_is_a_principal_component_analysis(tab: Tab) -> None:
    points = np.random.default_rng(0).normal(size=(9, 12)) * np.geomspace(5, 0.1, 12)
    found = tab.value(f"import('/app.js').then((app) => app.project({json.dumps(points.tolist())}))")
    u, s, _ = np.linalg.svd(points - points.mean(0), full_matrices=False)
    np.testing.assert_allclose(np.abs(found), np.abs(u[:, :2] * s[:2]), rtol=1e-3, atol=1e-3)
    one = tab.value(f"import('/app.js').then((app) => app.project({json.dumps(centroids()[:1])}))")
    assert one == [[0, 0]]


@pytest.mark.parametrize(
    ("fault", "message"),
    [({"fail": 1}, "429: code_429: the queue is full"), ({"break_at": 3}, "ended early|network|reached"),
     ({"api_key": "k"}, "401: code_401: the API key")],
)  # fmt: skip
def test_errors_are_shown(stub: CompletionServer, tab: Tab, fault: dict[str, Any], message: str) -> None:
    vars(stub).update(fault)
    generate(tab)
    tab.wait("document.querySelector('#status').textContent === 'Failed.'")
    shown = tab.text("#error")
    assert any(part in shown for part in message.split("|")), shown
    assert "failed" in tab.text("#first .about")
    vars(stub).update(fail=0, break_at=0, api_key="")
    generate(tab)
    tab.wait(DONE)
    assert tab.text("#error") == ""


def test_an_api_key_is_asked_for_sent_and_not_kept(stub: CompletionServer, tmp_path: Path) -> None:
    stub.api_key = "k"
    with open_tab(find_chromium(), f"{stub.url}/", tmp_path) as tab:
        tab.wait("document.querySelector('#error').textContent.startsWith('401')")
        assert tab.value("document.querySelector('#more').open")
        tab.click("#key")
        tab.write("#key", "k")
        tab.key("Tab")
        tab.wait("document.querySelector('#model').options.length && document.querySelector('#error').hidden")
        generate(tab)
        tab.wait(DONE)
        assert tab.value("localStorage.length + sessionStorage.length + document.cookie.length") == 0


def test_a_server_that_is_gone(stub: CompletionServer, tab: Tab) -> None:
    stub.shutdown()
    stub.server_close()
    generate(tab)
    tab.wait("document.querySelector('#error').textContent === 'The server cannot be reached.'")
    tab.wait("document.querySelector('#live-rows').textContent === '-'")


@pytest.fixture(scope="session")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The source of axe-core, installed by npm."""
    npm = find_program("npm", install="apt-get install npm")
    directory = tmp_path_factory.mktemp("axe")
    arguments = [
        npm,
        "install",
        "--prefix",
        str(directory),
        "--no-audit",
        "--no-fund",
        "--ignore-scripts",
        "axe-core@4",
    ]
    subprocess.run(arguments, check=True, capture_output=True, timeout=300)
    return (directory / "node_modules" / "axe-core" / "axe.min.js").read_text("utf-8")


def faults(tab: Tab, axe: str) -> list[str]:
    """Serious and critical ones."""
    tab.send("Runtime.evaluate", expression=axe)
    violations = tab.value("axe.run().then((r) => r.violations)")
    return [
        f"{fault['id']}: {node['html']}" for fault in violations if fault["impact"] in ("serious", "critical")
        for node in fault["nodes"]
    ]  # fmt: skip


@pytest.mark.parametrize(("dark", "size"), [(False, (1280, 900)), (True, (1280, 900)), (False, PHONE)])
def test_accessibility(tab: Tab, axe: str, dark: bool, size: tuple[int, int]) -> None:
    tab.dark(dark)
    tab.size(*size)
    assert faults(tab, axe) == []
    tab.value("document.querySelector('details').open = true")
    tab.click("#compare")
    generate(tab)
    tab.wait(DONE)
    tab.click("#curl")
    tab.point("#first [role=option]:nth-child(2)")
    assert faults(tab, axe) == []
    tab.value("document.querySelector('label[for=prompt]').remove()")
    assert [fault.partition(":")[0] for fault in faults(tab, axe)] == ["label"]  # it would have seen one


def test_phone_width(tab: Tab) -> None:
    tab.size(*PHONE, mobile=True)
    tab.click("#compare")
    generate(tab, "word" * 60, 40)
    tab.wait(DONE)
    assert tab.value("document.documentElement.scrollWidth") <= PHONE[0]
    left, right = tab.value(
        "['first', 'second'].map((id) => document.querySelector('#' + id).getBoundingClientRect().x)"
    )
    assert left == right  # one below the other


def test_dark_mode(tab: Tab, tmp_path: Path) -> None:
    brightness = []
    for dark in (False, True):
        tab.dark(dark)
        tab.screenshot(tmp_path / "page.png")
        brightness.append(read_pixels(tmp_path / "page.png").mean())
    assert brightness[0] > 200 > 60 > brightness[1]


@pytest.fixture
def served_tab(server: Running, tmp_path: Path) -> Iterator[Tab]:
    with open_tab(find_chromium(), f"{server.url}/", tmp_path) as tab:
        tab.wait("document.querySelector('#map circle')")
        yield tab


def test_stream_on_the_server(server: Running, served_tab: Tab) -> None:
    generate(served_tab, "The river", 40)
    served_tab.wait(DONE)
    body = {"model": server.name, "prompt": "The river", "max_tokens": 40, "temperature": 0.8, "seed": 0}
    answer = server.post("/v1/completions", **body).json()
    assert served_tab.value("document.querySelector('#first .text').textContent") == (
        "The river" + answer["choices"][0]["text"]
    )
    assert f"cluster {answer['choices'][0]['chameleon']['cluster_id']}" in served_tab.text("#first .about")
    assert f"{answer['usage']['completion_tokens']} tokens" in served_tab.text("#first .about")
    served_tab.point("#first [role=option]")
    found = alternatives(served_tab)
    assert found is not None
    assert len(found) >= 5
    assert served_tab.complaints == []


def test_compare_and_map_on_the_server(server: Running, served_tab: Tab) -> None:
    served_tab.click("#compare")
    generate(served_tab, "The river", 12)
    served_tab.wait(DONE)
    assert served_tab.text("#second-title") == f"{server.name}:none"
    for panel in ("first", "second"):
        assert tokens(served_tab, panel)
    served_tab.wait("document.querySelector('#map .now')")
    (item,) = server.post("/v1/adapt", input="The river").json()["data"]
    cluster, distance = served_tab.value(
        "[...document.querySelector('#distances tbody tr').cells].slice(0, 2).map((c) => c.textContent)"
    )
    assert int(cluster) == item["cluster_id"]
    assert float(distance) == pytest.approx(min(item["distances"]), abs=1e-4)
    served_tab.wait("document.querySelector('#live-rows').textContent === '0'")


def test_stop_and_copy_on_the_server(server: Running, served_tab: Tab) -> None:
    served_tab.click("#curl")
    command = served_tab.value("document.querySelector('#command').value")
    answer = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True, timeout=30)
    assert json.loads(answer.stdout)["model"] == server.name
    generate(served_tab, "The river", 100)
    served_tab.key("Escape")
    served_tab.wait("['Stopped.', 'Done.'].includes(document.querySelector('#status').textContent)")
    server.wait_until_idle()


def test_an_error_of_the_server(served_tab: Tab) -> None:
    generate(served_tab, "word " * 500)
    served_tab.wait("document.querySelector('#status').textContent === 'Failed.'")
    assert "400: text_too_long" in served_tab.text("#error")


@pytest.mark.skipif(not os.environ.get("CHAMELEON_SCREENSHOTS"), reason="CHAMELEON_SCREENSHOTS=1 writes them")
def test_screenshots(bundle: Path, tmp_path: Path) -> None:
    SCREENSHOTS.mkdir(exist_ok=True)
    with (
        running(Path(os.environ.get("CHAMELEON_BUNDLE", bundle))) as server,
        open_tab(find_chromium(), f"{server.url}/", tmp_path) as tab,
    ):
        tab.wait("document.querySelector('#map circle')")
        for prompt in ("def read(path):", "The museum is open", "import os, sys", "A list of"):
            generate(tab, prompt, 1)
            tab.wait(DONE)
        tab.click("#compare")
        for name, dark, size in VIEWS:
            tab.dark(dark)
            tab.size(*size, mobile=size == PHONE)
            generate(tab, "The river", 32)
            tab.wait(DONE)
            tab.point("#first [role=option]:nth-child(5)")
            tab.screenshot(SCREENSHOTS / f"{name}.png")
            assert (SCREENSHOTS / f"{name}.png").stat().st_size < MAX_SCREENSHOT
