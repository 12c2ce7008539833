"""What the machine has, read from files of the system."""

from __future__ import annotations

from pathlib import Path

import pytest

from chameleon_deploy.runtime import machine


def test_free_memory_is_that_of_the_system_and_of_its_control_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [tmp_path / name for name in ("limit", "used", "statistics")]
    monkeypatch.setattr(machine, "CONTROL_GROUPS", (tuple(map(str, files)),))
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    total = 1024 * int(fields["MemTotal"].split()[0])
    free = machine.free_memory()
    assert free is not None
    assert 0 < free < total
    for limit, left in (("1000", 1000 - (700 - 300)), ("400", 1), ("100", 1)):
        for file, content in zip(files, (limit, "700", "anon 5\ninactive_file 300\n"), strict=True):
            file.write_text(content)
        assert machine.free_memory() == left
    files[0].write_text("max")
    assert machine.free_memory() != left
    monkeypatch.setattr(Path, "read_text", lambda *_: "")  # another system
    assert machine.free_memory() is None
