# SPDX-License-Identifier: Apache-2.0
"""What nobody sees until the next start: found by health, and mended by one site.yml."""

from __future__ import annotations

import json
import re

import pytest

from .conftest import ROOT, Fleet, lab
from .load import under_load
from .test_upgrade import assert_no_request_was_lost, ready, row

pytestmark = [pytest.mark.fleet, pytest.mark.long]

SITE = "$(echo /opt/glm-fleet/current/lib/python*/site-packages)"


def test_damage_of_every_kind_is_found_and_mended_by_one_run(fleet: Fleet) -> None:
    assert fleet.playbook("site.yml").rc == 0
    first, second, third = fleet.nodes
    fleet.shell(first, f"rm {SITE}/vllm/envs.py")
    fleet.shell(
        second,
        "ln -sfn /nowhere /opt/glm-fleet/current; "
        "rm /srv/glm-fleet/model; mkdir /srv/glm-fleet/model",
    )
    fleet.shell(
        third,
        "rm /run/glm-fleet/attested.json; journalctl --rotate; journalctl --vacuum-time=1ms",
    )
    seen = fleet.playbook("playbooks/health.yml")
    assert seen.rc != 0
    report = json.loads((ROOT / "reports/fleet.json").read_text())
    causes = {
        each["name"]: [finding["cause"] for finding in each["findings"]] for each in report["nodes"]
    }
    assert any("vllm/envs.py: missing" in cause for cause in causes[first]), causes
    assert any("/opt/glm-fleet/current leads to /nowhere" in cause for cause in causes[second])
    assert any("/srv/glm-fleet/model is no link" in cause for cause in causes[second])
    with under_load(fleet, "mend the damage") as load:
        run = fleet.playbook("site.yml", "-e", "serve_min_ready=1")
        assert run.rc == 0, run.output[-6000:]
    assert_no_request_was_lost(load)
    said = " ".join(run.output.split())
    assert re.search(r"its environment is damaged: \S*vllm/envs.py missing", said)
    assert "nothing proves it" in said
    assert fleet.shell(first, f"test -s {SITE}/vllm/envs.py").rc == 0
    links = fleet.shell(second, "readlink /opt/glm-fleet/current /srv/glm-fleet/model").output
    assert re.fullmatch(r"/opt/glm-fleet/releases/\S+\n/srv/glm-fleet/\S+/model/\S+\n", links)
    assert ready(fleet) == fleet.nodes
    again = fleet.playbook("site.yml")
    assert (again.rc, again.changed) == (0, {}), again.output[-3000:]


def test_one_node_is_repaired_while_another_is_down(fleet: Fleet) -> None:
    broken, dead, healthy = fleet.nodes[1], fleet.nodes[2], fleet.nodes[0]
    invocation = "systemctl show -P InvocationID glm-serving"
    before = {node: fleet.shell(node, invocation).output for node in (broken, healthy)}
    fleet.shell(
        broken,
        "file=$(ls /srv/glm-fleet/model/*.safetensors | head -1); size=$(stat -c %s $file); "
        "chattr -i $file 2>/dev/null; head -c 64 /dev/zero | "
        "dd of=$file bs=1 seek=$((size - 64)) conv=notrunc 2>/dev/null; "
        f"echo '# edited' >> {SITE}/vllm/envs.py",
    )
    lab("power", dead, "cut")
    try:
        run = fleet.playbook(
            "site.yml", "-e", f"repair={broken}", "-e", "ansible_ssh_timeout=5",
            "-e", "serve_min_ready=1", "-e", "health_fail_on=never",
        )  # fmt: skip
        row(run, broken, "serves")
        assert "its environment is damaged" in run.output
        assert fleet.shell(broken, invocation).output != before[broken]
        assert fleet.shell(healthy, invocation).output == before[healthy]
        assert broken in ready(fleet)
    finally:
        lab("power", dead, "join")
    deep = fleet.playbook("playbooks/health.yml", "-e", "health_deep=true", "--limit", broken)
    assert deep.rc == 0, deep.output[-3000:]
    assert fleet.playbook("site.yml").rc == 0
    assert ready(fleet) == fleet.nodes


def test_weight_0_is_found_and_mended(fleet: Fleet) -> None:
    node = fleet.nodes[0]
    script = (
        "import socket; s = socket.socket(socket.AF_UNIX); s.connect('/run/haproxy/admin.sock'); "
        f"s.sendall(b'set server glm_nodes/{node} weight 0\\n'); print(s.recv(999))"
    )
    fleet.shell(fleet.gateway, f'python3 -c "{script}"')
    seen = fleet.playbook("playbooks/health.yml")
    assert seen.rc != 0
    assert f"DRAIN at {fleet.gateway}" in seen.output
    assert fleet.playbook("site.yml").rc == 0
    assert ready(fleet) == fleet.nodes
    assert fleet.playbook("playbooks/health.yml").rc == 0
