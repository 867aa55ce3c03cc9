# SPDX-License-Identifier: Apache-2.0
"""A roll as playbooks/_roll.yml takes it, with its real roles and plugins.

Only the modules are stand-ins: they write down who was asked for what, and answer as hosts would.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
ADDRESSES = {"gpu01": "127.0.0.11", "gpu02": "127.0.0.12", "gw01": "127.0.0.21"}
MODULE = """#!/usr/bin/python
# WANT_JSON
import json, os, sys, time
given = json.load(open(sys.argv[1]))
host, folder, name = os.environ["GLM_HOST"], os.environ["GLM_TEST"], @NAME@
asked = given.get("state") or given.get("mode") or "read"
with open(f"{folder}/calls", "a") as calls:
    words = [host, name, asked, given.get("server") or given.get("id") or ""]
    calls.write(" ".join(each for each in words if each) + "\\n")
node = {"id": "new", "port": 8000, "release": "r2", "model": "m", "cuda_graphs": "eager"}
servers = [
    {"name": each, "admin_state": "ready", "status": "UP", "address": address, "port": 8000}
    for each, address in {"gpu01": "127.0.0.11", "gpu02": "127.0.0.12"}.items()
]
answers = {
    "fleet_lock": {"roll": {}, "held": {}},
    "haproxy_info": {"gateway": {"valid": True, "servers": servers}},
    "deployment info": {
        "wanted": node, "ladder": ["new"], "back": "old", "differences": ["release r1 -> r2"],
        "running": {"active": True, "record": {"release": "r1"}},
    },
    "deployment active": {"deployment": {**node, "id": given.get("id")}, "changed": True},
    "rehearsal": {"rehearsal": {"id": "new", "words": "rehearsed in 9 s"}},
    "vllm_probe watch": {"watched": {"ready": True, "phase": "ready", "progress": ""}},
    "vllm_probe attest": {"attestation": {"passed": True}},
    "haproxy_server": {"before": "ready", "sessions": 0, "changed": True},
}
answer = answers.get(name) or answers.get(f"{name} {asked}") or {}
told = json.load(open(f"{folder}/told"))
time.sleep(told.get("pauses", {}).get(f"{name} {asked}", 0))
failing = f"{folder}/failing"
if asked == "attest" and host == told.get("fails") and not os.path.exists(failing):
    open(failing, "w").close()
    answer = {"failed": True, "msg": "it died", "diagnosis": "out of memory"}
print(json.dumps({"changed": False, **answer}))
"""
PLAY = """
- import_playbook: {root}/playbooks/_inventory.yml
- import_playbook: {root}/playbooks/_lock.yml
- hosts: gpu_nodes
  gather_facts: false
  tasks:
    - deployment: {{state: info}}
      register: __serving_info
- import_playbook: {root}/playbooks/_roll.yml
"""
SWITCHED = [
    "gw01 haproxy_server drain {node}",
    "{node} rehearsal read",
    "{node} deployment active new",
    "{node} vllm_probe attest",
]


class Roll:
    """A fleet of two nodes and a gateway that are this machine under other names."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "library").mkdir()
        for name in ("haproxy_server", "haproxy_info", "deployment", "vllm_probe", "fleet_lock",
                     "model_pages", "rehearsal"):  # fmt: skip
            (folder / "library" / f"{name}.py").write_text(MODULE.replace("@NAME@", repr(name)))
        groups = {"gpu_nodes": ("gpu01", "gpu02"), "gateways": ("gw01",)}
        children = {
            group: {"hosts": {name: self._host(name) for name in names}}
            for group, names in groups.items()
        }
        (folder / "hosts.yml").write_text(yaml.safe_dump({"all": {"children": children}}))
        (folder / "play.yml").write_text(PLAY.format(root=ROOT))

    def _host(self, name: str) -> dict[str, Any]:
        python = self.folder / f"python-{name}"
        python.write_text(
            f'#!/bin/sh\nGLM_HOST={name} GLM_TEST={self.folder} exec {sys.executable} "$@"\n'
        )
        python.chmod(0o755)
        return {
            "ansible_host": ADDRESSES[name],
            "ansible_connection": "local",
            "ansible_become": False,
            "ansible_python_interpreter": str(python),
        }

    def start(self, *arguments: str, **told: Any) -> subprocess.Popen[str]:
        """Start the roll; ``told`` says who fails and which modules take their time."""
        (self.folder / "told").write_text(json.dumps(told))
        return subprocess.Popen(
            [str(Path(sys.executable).with_name("ansible-playbook")), "-i", "hosts.yml",
             "play.yml", *arguments],
            env={
                **os.environ,
                "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
                "ANSIBLE_LIBRARY": f"{self.folder}/library:{ROOT}/library",
                "ANSIBLE_NOCOLOR": "1",
                # A local connection looks below the user's own home, a module below $HOME.
                "ANSIBLE_ASYNC_DIR": str(self.folder / "jobs"),
            },
            cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip

    def run(self, *arguments: str, **told: Any) -> tuple[int, str]:
        """Run the roll to its end."""
        with self.start(*arguments, **told) as process:
            output = process.communicate(timeout=180)[0]
        return process.returncode, output

    def calls(self) -> list[str]:
        """Return what changed something, and every attestation, in order."""
        told = (self.folder / "calls").read_text().splitlines()
        aside = ("fleet_lock", "haproxy_info", "deployment info", "watch", "model_pages",
                 "vllm_probe answers")  # fmt: skip
        return [line for line in told if not any(word in line for word in aside)]


@pytest.fixture
def roll(tmp_path: Path) -> Roll:
    return Roll(tmp_path)


def test_a_roll_takes_one_node_after_the_other(roll: Roll) -> None:
    rc, output = roll.run()
    assert rc == 0, output
    expected = [
        line.format(node=node)
        for node in ("gpu01", "gpu02")
        for line in (*SWITCHED, "gw01 haproxy_server ready {node}")
        # What is new is rehearsed once, by the first node that gets it.
        if (node, line) != ("gpu02", SWITCHED[1])
    ]
    assert roll.calls() == expected
    assert "gpu02  serves   r2" in output
    assert "rehearsed in 9 s" in output


def test_a_roll_stops_at_the_first_node_that_fails(roll: Roll) -> None:
    rc, output = roll.run(fails="gpu01")
    assert rc != 0
    assert roll.calls() == [
        *(line.format(node="gpu01") for line in SWITCHED),
        "gw01 haproxy_server drain gpu01",
        "gpu01 deployment active old",
        "gpu01 vllm_probe attest",
        "gw01 haproxy_server ready gpu01",
    ]
    assert "The roll stopped at gpu01 (rolled back); 1 nodes were not touched" in output
    assert (roll.folder / "calls").read_text().splitlines()[-1] == "gw01 fleet_lock stopped"


def test_check_mode_takes_no_turn(roll: Roll) -> None:
    rc, output = roll.run("--check")
    assert rc == 0, output
    assert roll.calls() == []
    assert "Roll: 2 of 2 nodes are restarted" in output
    assert "gpu01 rehearses it with random weights once drained" in " ".join(output.split())


def children(pid: int) -> list[int]:
    """Return the children of a process, and theirs."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found += [child, *children(child)]
    return found


def test_a_turn_whose_controller_is_gone_does_no_further_step(roll: Roll) -> None:
    """Ansible's workers live on: the next run would work on the node together with this one."""
    process = roll.start(pauses={"haproxy_server drain": 3})
    assert process.stdout is not None
    for line in process.stdout:
        if "gpu01: drains" in line:
            break
    while roll.calls() != ["gw01 haproxy_server drain gpu01"]:
        time.sleep(0.05)
    left = [(pid, os.pidfd_open(pid)) for pid in children(process.pid)]
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    try:
        # The drain goes on to its end. Whoever did it is then left with nothing to do.
        end, before, spent = time.monotonic() + 60, -1, 0
        while spent != before:
            assert time.monotonic() < end, "what the controller left goes on"
            before = spent
            time.sleep(4)  # longer than that drain takes
            spent = sum(_ticks(pid) for pid, _ in left)
        assert roll.calls() == ["gw01 haproxy_server drain gpu01"]
    finally:
        for _, handle in left:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, signal.SIGKILL)
            os.close(handle)


def _ticks(pid: int) -> int:
    """Return the processor time that a process and its children took; 0 if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return sum(map(int, fields[11:15]))
