# SPDX-License-Identifier: Apache-2.0
"""The unit of a rehearsal, made from the one that Ansible renders."""

from __future__ import annotations

from pathlib import Path

import pytest
from glm_fleet.serving.rehearsal import exec_words, rehearsal_command, rehearsal_unit

from tests.rendering import render


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    files = ["glm-serving.service", "glm-serving.conf"]
    return render(tmp_path_factory.mktemp("unit"), "serving", files, roles=["common", "artifact"])


def test_the_unit_is_the_real_one_with_another_model(rendered: Path, tmp_path: Path) -> None:
    unit = (rendered / "glm-serving.service").read_text()
    drop_in = (rendered / "glm-serving.conf").read_text()
    words = exec_words(unit)
    assert words[-2:] == ["--compilation-config", '{"cudagraph_mode":"FULL_AND_PIECEWISE"}']
    ours = rehearsal_command(words, program=Path("/r/bin/vllm"), model=Path("/m"), port=45678)
    lost = {"--host": "0.0.0.0", "--port": "8000"}
    found = dict(zip(ours[3:], ours[4:]))
    assert all(found[name] != value for name, value in lost.items())
    assert found["--load-format"] == "dummy"
    assert found["--compilation-config"] == words[-1]
    kept = [each for each in words[3:] if each not in (*lost, *lost.values())]
    assert [each for each in ours[3:] if each in kept] == kept
    text = rehearsal_unit(unit, drop_in, ours, tmp_path / "env")
    # What systemd starts is what was meant.
    assert exec_words(text) == ours
    lines = text.splitlines()
    assert f"EnvironmentFile={tmp_path}/env" in lines
    for each in ("User=glm", "ProtectSystem=strict", "KillMode=mixed", "RestrictNamespaces=yes",
                 "Conflicts=glm-serving.service"):  # fmt: skip
        assert each in lines
    for word in ("Restart", "ExecStartPre", "[Install]", "serving.env", "StartLimit", "gate"):
        assert not any(line.startswith(word) or word in line for line in lines
                       if not line.startswith("Restrict")), word  # fmt: skip
