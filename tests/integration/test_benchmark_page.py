# SPDX-License-Identifier: Apache-2.0
"""The benchmark's page in a real browser, wide and narrow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from glm_fleet.bench.page import render_page
from test_page_of_a_benchmark import TEMPLATE, answer, report

from tests.browser import browse, too_wide

ROOT = Path(__file__).resolve().parents[2]
PAGE = render_page(report("vllm-0.24.0-new", 60), report("vllm-0.24.0-old", 50), TEMPLATE)


@pytest.mark.parametrize("width", [400, 1280])
def test_the_page_fits_the_window(width: int, tmp_path: Path) -> None:
    assert not too_wide(tmp_path, PAGE, width)


def test_the_page_is_drawn(tmp_path: Path) -> None:
    picture = tmp_path / "page.png"
    browse(tmp_path, PAGE, "--window-size=1280,1000", f"--screenshot={picture}")
    assert picture.stat().st_size > 20_000


PLAY = """
- hosts: gpu_nodes
  gather_facts: false
  tasks:
    - ansible.builtin.set_fact:
        __benchmark_node: "{{ lookup('file', folder ~ '/answer.json') | from_json }}"
    - ansible.builtin.include_role: {name: benchmark, tasks_from: report}
"""


def test_a_report_keeps_the_last_one_of_another_release(tmp_path: Path) -> None:
    (tmp_path / "play.yml").write_text(PLAY)
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports/benchmark.json").write_text("damaged")
    hosts = {
        "gpu_nodes": {"hosts": {"gpu01": {"ansible_connection": "local"}}},
        "gateways": {"hosts": {}},
    }
    (tmp_path / "hosts.yml").write_text(yaml.safe_dump({"all": {"children": hosts}}))
    command = [
        str(Path(sys.executable).with_name("ansible-playbook")),
        *("-i", "hosts.yml", "play.yml", "-e", f"folder={tmp_path}"),
        *("-e", f"benchmark_report_dir={tmp_path}/reports"),
    ]
    environment = {
        **os.environ,
        "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
        "ANSIBLE_ROLES_PATH": str(ROOT / "roles"),
    }
    for release in ("old", "new", "new"):
        (tmp_path / "answer.json").write_text(json.dumps(answer(release, 60)))
        done = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
    before = json.loads((tmp_path / "reports/benchmark-before.json").read_text())
    assert [each["release"] for each in before["targets"]] == ["old"]
    page = (tmp_path / "reports/benchmark.html").read_text()
    assert "release new" in page
    assert "before: old" in page
