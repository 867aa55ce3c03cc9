# SPDX-License-Identifier: Apache-2.0
"""Ports and nodes that change: nobody goes out but by the turn of a roll, or when asked for."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import yaml

from .conftest import INVENTORY, ROOT, Fleet, Run, keep
from .load import under_load
from .test_upgrade import assert_no_request_was_lost, ready

pytestmark = [pytest.mark.fleet, pytest.mark.long]

MOVED = ("-e", "serving_port=8010")


def with_inventory(inventory: Path, playbook: str, *arguments: str) -> Run:
    """Run a playbook with another inventory than the lab's own."""
    command = [str(ROOT / ".venv/bin/ansible-playbook"), "-i", str(inventory), playbook, *arguments]
    environment = {**os.environ, "ANSIBLE_NOCOLOR": "1", "COLUMNS": "200"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=600
    )
    keep(" ".join([playbook, *arguments]), done.stdout + done.stderr)
    return Run(done.returncode, done.stdout + done.stderr)


def test_a_changed_port_is_part_of_each_node_s_turn(fleet: Fleet) -> None:
    assert fleet.playbook("site.yml").rc == 0
    with under_load(fleet, "change the port of every node") as load:
        run = fleet.playbook("site.yml", *MOVED, "-e", "serve_min_ready=2")
        assert run.rc == 0, run.output[-6000:]
    assert_no_request_was_lost(load)
    assert load.fewest_ready() >= 2
    assert ready(fleet) == fleet.nodes
    assert ":8000 -> " in run.output
    config = fleet.shell(fleet.gateway, "cat /etc/haproxy/haproxy.cfg").output
    assert config.count(":8010") == len(fleet.nodes)
    again = fleet.playbook("playbooks/gateway.yml", *MOVED)
    assert (again.rc, again.changed) == (0, {}), again.output[-3000:]


def test_a_node_that_is_left_out_is_asked_for_and_then_leaves(fleet: Fleet, tmp_path: Path) -> None:
    data = yaml.safe_load((INVENTORY / "hosts.yml").read_text())
    gone = fleet.nodes[-1]
    del data["all"]["children"]["gpu_nodes"]["hosts"][gone]
    inventory = tmp_path / "hosts.yml"
    inventory.write_text(yaml.safe_dump(data))
    (tmp_path / "group_vars").symlink_to(INVENTORY / "group_vars")
    refused = with_inventory(inventory, "playbooks/gateway.yml", *MOVED)
    assert refused.rc != 0
    assert f"-e serve_remove={gone}" in refused.output
    assert ready(fleet) == fleet.nodes
    with under_load(fleet, "a node leaves") as load:
        remove = (*MOVED, "-e", f"serve_remove={gone}")
        run = with_inventory(inventory, "playbooks/gateway.yml", *remove)
        assert run.rc == 0, run.output[-3000:]
    assert_no_request_was_lost(load)
    assert ready(fleet) == fleet.nodes[:-1]
    back = fleet.playbook("site.yml", *MOVED)
    assert back.rc == 0, back.output[-3000:]
    assert ready(fleet) == fleet.nodes
