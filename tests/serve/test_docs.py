"""docs/serving.md and what lies beside it say what the server does."""

from __future__ import annotations

import json
import re
import shlex
import subprocess

import pytest

from chameleon_deploy.serve.operations import OPERATIONS
from tests.conftest import REPOSITORY
from tests.serving import Running

PAGE = (REPOSITORY / "docs" / "serving.md").read_text()
FOLDER = REPOSITORY / "docs" / "serving"


@pytest.mark.parametrize("name", ["dashboard.json", "alerts.yaml", "../scaling/kubernetes.yaml"])
def test_every_metric_that_is_asked_for_exists(server: Running, name: str) -> None:
    text = server.http().get("/metrics").text
    exported = set(re.findall(r"^(?:# TYPE )?(chameleon_\w+)", text, re.MULTILINE))
    for histogram in re.findall(r"^# TYPE (\w+) histogram", text, re.MULTILINE):  # also those without a value yet
        exported |= {f"{histogram}_{part}" for part in ("bucket", "count", "sum")}
    asked = set(re.findall(r"chameleon_\w+", (FOLDER / name).read_text()))
    assert asked and asked <= exported


def test_every_metric_is_in_the_page(server: Running) -> None:
    families = re.findall(r"^# TYPE chameleon_(\w+) (?:counter|histogram)", server.http().get("/metrics").text, re.M)
    assert [name for name in families if not name.endswith("_created") and name not in PAGE] == []


def test_the_dashboard_is_one() -> None:
    dashboard = json.loads((FOLDER / "dashboard.json").read_text())
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_every_endpoint_is_in_the_page() -> None:
    assert [operation.path for operation in OPERATIONS if operation.path not in PAGE] == []


@pytest.mark.parametrize("line", re.findall(r"^curl .*$", PAGE, re.MULTILINE))
def test_an_example_works(server: Running, line: str) -> None:
    command = shlex.split(line.replace("http://127.0.0.1:8000", server.url))
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout and '"error"' not in result.stdout
