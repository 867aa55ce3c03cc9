# SPDX-License-Identifier: Apache-2.0
"""What preflight and health cost beside a ping, and whether that stays so as a fleet grows.

Ansible sees 4, 16 and 32 nodes, each with an address, a connection and its own run of each
module. They all are one host of the lab: what is scarce here is this machine. In a fleet, nodes
have processors of their own: there, the controller's share is what grows.
"""

from __future__ import annotations

import os
import resource
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from lab.hosts import KNOWN_HOSTS, ssh_command
from lab.settings import ALL_HOSTS, INVENTORY, NETWORK, existing_hosts

from ..fleet.conftest import ROOT, lab
from .conftest import Record

ROUNDS = 3
SIZES = (4, 16, 32)
NODE = ALL_HOSTS["gpu01"]
GOAL = 1.5
# Enough of a server for health to ask it, so that no round trip is missing.
POLICY = '{"port": 8000, "served_model_name": "glm-5.2", "required": [], "forbidden": []}'
SERVE = f"""
mkdir -p /etc/glm-fleet
echo '{POLICY}' > /etc/glm-fleet/attestation.json
systemctl is-active --quiet glm-serving ||
    systemd-run --quiet --unit=glm-serving python3 /home/ops/stub.py 8000
"""
# The real nvidia-smi waits for its driver. The lab's works its answers out, on the processors that
# are scarce here: of 32 nodes at once, that would be a good part of what is measured.
REMEMBER = r"""
[ -e /usr/bin/nvidia-smi.lab ] || mv /usr/bin/nvidia-smi /usr/bin/nvidia-smi.lab
mkdir -p /run/nvidia-smi
cat > /usr/bin/nvidia-smi <<'END'
#!/bin/sh
told="/run/nvidia-smi/$*"
[ -e "$told" ] || { nvidia-smi.lab "$@" > "$told.$$" && mv "$told.$$" "$told"; }
exec cat "$told"
END
chmod 755 /usr/bin/nvidia-smi
"""
FORGET = """
systemctl stop glm-serving
rm -r /etc/glm-fleet/attestation.json /run/nvidia-smi
mv /usr/bin/nvidia-smi.lab /usr/bin/nvidia-smi
"""


def on_node(script: str, text: str = "") -> None:
    command = [*ssh_command(NODE), script]
    subprocess.run(command, input=text, capture_output=True, text=True, check=True)


@pytest.fixture(scope="module")
def addresses() -> Iterator[list[str]]:
    """As many addresses of one lab node as the largest fleet has nodes."""
    had = existing_hosts()
    if not had:
        lab("up", "--nodes", "1")
    known = KNOWN_HOSTS.read_text()
    _, kind, blob = next(line for line in known.splitlines() if NODE.address in line).split()[:3]
    more = [str(NETWORK[number]) for number in range(150, 150 + max(SIZES) - 1)]
    inside = ["ip", "netns", "exec", NODE.netns, "ip", "address"]
    for address in more:
        where = [f"{address}/{NETWORK.prefixlen}", "dev", "eth0"]
        subprocess.run([*inside, "replace", *where], check=True)
    KNOWN_HOSTS.write_text(known + "".join(f"{each} {kind} {blob}\n" for each in more))
    # A gateway without HAProxy would be waited for, as if it was being restarted.
    cost(INVENTORY.parent, "ansible-playbook", "playbooks/gateway.yml")
    on_node("cat > stub.py", (ROOT / "tests/stub.py").read_text())
    on_node("sudo sh -s", SERVE + REMEMBER)
    try:
        yield [NODE.address, *more]
    finally:
        if had:
            on_node("sudo sh -s", FORGET)
            for address in more:
                where = [f"{address}/{NETWORK.prefixlen}", "dev", "eth0"]
                subprocess.run([*inside, "del", *where], check=True)
            KNOWN_HOSTS.write_text(known)
        else:
            lab("down")


@pytest.fixture
def inventory(tmp_path: Path, addresses: list[str]) -> Callable[[int], Path]:
    """Write an inventory of so many nodes, otherwise that of the lab."""

    def write(size: int) -> Path:
        folder = tmp_path / str(size)
        shutil.copytree(INVENTORY.parent, folder)
        hosts = yaml.safe_load(INVENTORY.read_text())
        # Not inside the inventory: Ansible would read the reports as a part of it.
        hosts["all"]["vars"]["health_report_dir"] = str(tmp_path / f"reports-{size}")
        hosts["all"]["children"]["gpu_nodes"]["hosts"] = {
            f"gpu{number:02d}": {"ansible_host": address}
            for number, address in enumerate(addresses[:size], start=1)
        }
        (folder / "hosts.yml").write_text(yaml.safe_dump(hosts))
        return folder

    return write


def cost(inventory: Path, program: str, *arguments: str) -> tuple[float, float]:
    """Run a program of Ansible's with the repository's forks.

    Return the seconds it took, and the seconds of processor that the controller spent.
    """
    command = [str(ROOT / ".venv/bin" / program), "-i", str(inventory), *arguments]
    environment = {**os.environ, "ANSIBLE_NOCOLOR": "1"}
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    taken, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    assert "unreachable=1" not in done.stdout
    return taken, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize("size", SIZES)
def test_preflight_and_health_beside_a_ping(
    size: int, inventory: Callable[[int], Path], record: Record
) -> None:
    folder = inventory(size)
    ways = {
        "ping": ("ansible", "gpu_nodes:gateways", "-m", "ansible.builtin.ping"),
        "preflight": ("ansible-playbook", "playbooks/preflight.yml"),
        "health": ("ansible-playbook", "playbooks/health.yml", "-e", "health_fail_on=never"),
    }
    cost(folder, *ways["ping"])  # opens the connections that all of them share
    costs: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            costs[name].append(cost(folder, *way))
    for name in ("preflight", "health"):
        for part, what in enumerate(("", "_controller")):
            pairs = zip(costs[name], costs["ping"])
            ping = statistics.median(each[part] for each in costs["ping"])
            record(
                f"scale_{name}{what}_{size}",
                statistics.median(mine[part] / other[part] for mine, other in pairs),
                goal=GOAL,
                unit="times a ping's processor time" if what else "times a ping",
                context=f"{size} nodes, a gateway, median of {ROUNDS}; a ping: {ping:.1f} s",
            )
