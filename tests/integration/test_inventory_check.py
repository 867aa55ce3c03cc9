# SPDX-License-Identifier: Apache-2.0
"""The inventory check as playbooks/_inventory.yml makes it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]


def run_check(tmp_path: Path, inventory: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """Run playbooks/_inventory.yml twice, as site.yml does, and look at what follows."""
    (tmp_path / "hosts.yml").write_text(yaml.safe_dump(inventory))
    (tmp_path / "play.yml").write_text(
        f"""
- ansible.builtin.import_playbook: {ROOT}/playbooks/_inventory.yml
- hosts: localhost
  gather_facts: false
  tasks:
    - ansible.builtin.set_fact: {{release_artifact: made}}
- ansible.builtin.import_playbook: {ROOT}/playbooks/_inventory.yml
- hosts: localhost
  gather_facts: false
  tasks:
    - ansible.builtin.debug:
        msg: "builders={{{{ groups.builders }}}} fetchers={{{{ groups.fetchers }}}}"
"""
    )
    return subprocess.run(
        [
            str(Path(sys.executable).parent / "ansible-playbook"),
            "-i",
            str(tmp_path / "hosts.yml"),
            str(tmp_path / "play.yml"),
        ],
        env={**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_playbook_checks_once_and_fills_the_groups(tmp_path: Path) -> None:
    example = yaml.safe_load((ROOT / "inventory/example/hosts.yml").read_text())
    example["all"]["vars"] = yaml.safe_load(
        (ROOT / "inventory/example/group_vars/all.yml").read_text()
    )
    done = run_check(tmp_path, example)
    assert done.returncode == 0, done.stdout
    assert "builders=['controller'] fetchers=['gpu01']" in done.stdout


def test_the_playbook_stops_before_any_host(tmp_path: Path) -> None:
    wrong = {
        "all": {
            "vars": {
                "serving_tensor_parallel_size": 3,
                "serving_prot": 1,
                "health_fail_on": "sometimes",
                "preflight_commands": "{{ later }}",
                "serve_batch": "{{ later }}",
            },
            "children": {"gpu_nodes": {"hosts": {"gpu01": {}}}},
        }
    }
    done = run_check(tmp_path, wrong)
    assert done.returncode == 2
    for words in (
        "4 mistakes",
        "does not divide",
        "serving_prot",
        "gateways has no hosts",
        "value of health_fail_on must be one of: never, broken, degraded, got: sometimes",
    ):
        assert words in done.stdout
    assert "builders=" not in done.stdout
