# SPDX-License-Identifier: Apache-2.0
"""What the version before made of an inventory is what this one makes of it.

A deployment is named by the text of its unit and its environment: one byte more, and a fleet that
only gets a newer glm-fleet is restarted node by node. tests/fleet/test_before.py shows the same on
real hosts.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.fleet.test_before import BEFORE

ROOT = Path(__file__).resolve().parents[2]
FILES = ("glm-serving.service", "serving.env")
# Said by the inventory, so that a default which changed on purpose makes no difference here.
SAID = {
    "serving_cuda_graphs": "piecewise",
    "serving_max_num_seqs": "",
    "serving_tool_call_parser": "",
    "serving_reasoning_parser": "",
}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "graphs": {"serving_cuda_graphs": "full_and_piecewise"},
    "eager": {"serving_cuda_graphs": "eager"},
    "parsers": {"serving_tool_call_parser": "glm47", "serving_reasoning_parser": "glm45"},
    "key": {"serving_api_key": "secret 'and' quoted"},
    "own": {"serving_environment": {"A": 1}, "serving_extra_arguments": ["--seed", "7"]},
}
RELEASE = {
    "__serving_release": "vllm-0.23.0-pr38476-0123456789ab",
    "__serving_made_release": {},
    "ansible_managed": "Ansible managed",
}


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The version before, unpacked."""
    folder = tmp_path_factory.mktemp("before")
    archive = subprocess.run(
        ["git", "-C", str(ROOT), "archive", BEFORE], capture_output=True, check=False
    )
    shallow = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--is-shallow-repository"],
        capture_output=True,
        text=True,
        check=False,
    )
    if archive.returncode != 0 and shallow.stdout.strip() == "true":
        pytest.skip(f"this clone has no history: commit {BEFORE} is not in it")
    if archive.returncode != 0:
        pytest.fail(
            f"The version before is not in this clone. Expected: commit {BEFORE} in its history. "
            f"Found: {archive.stderr.decode().strip()}. What to do: git fetch --unshallow."
        )
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)
    return folder


def rendered(root: Path, folder: Path) -> dict[str, dict[str, str]]:
    """Return {settings: {file: text}} of what a version writes for a node."""
    defaults = [root / "roles" / each / "defaults/main.yml" for each in ("common", "artifact")]
    tasks = []
    for name, settings in SETTINGS.items():
        (folder / name).mkdir(parents=True)
        for file in FILES:
            source = f"{root}/roles/serving/templates/{file}.j2"
            template = {"src": source, "dest": str(folder / name / file), "mode": "0600"}
            variables = {**RELEASE, **SAID, **settings}
            tasks.append({"ansible.builtin.template": template, "vars": variables})
    play = {
        "hosts": "localhost",
        "gather_facts": False,
        "vars_files": [
            *(str(path) for path in defaults if path.exists()),
            str(root / "roles/serving/defaults/main.yml"),
            str(root / "roles/serving/vars/main.yml"),
        ],
        "tasks": tasks,
    }
    (folder / "play.yml").write_text(yaml.safe_dump([play]))
    done = subprocess.run(
        [str(Path(sys.executable).with_name("ansible-playbook")), "-i",
         "localhost ansible_connection=local,", str(folder / "play.yml")],
        env={**os.environ, "ANSIBLE_CONFIG": str(root / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"},
        cwd=root, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return {name: {file: (folder / name / file).read_text() for file in FILES} for name in SETTINGS}


def test_a_newer_glm_fleet_restarts_no_engine(before: Path, tmp_path: Path) -> None:
    old, new = rendered(before, tmp_path / "old"), rendered(ROOT, tmp_path / "new")
    assert new == old
    assert len({text["glm-serving.service"] + text["serving.env"] for text in old.values()}) == 6
