# SPDX-License-Identifier: Apache-2.0
"""A compromised engine stays the service's user: what it plants is never run by root."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator

import pytest

from lab.settings import ALL_HOSTS

from .conftest import Fleet, wait_until

pytestmark = [pytest.mark.fleet, pytest.mark.long]

GUARD = "/etc/systemd/system/glm-serving.service.d/10-glm-fleet.conf"
# Modules that tell who runs them, in every folder that the service's user may write.
PLANT = r"""
set -e
told='import os; open("/tmp/told-%d" % os.getuid(), "a").write(__file__ + "\n")'
packages=$(cd ~ && python3 -c 'import site; print(site.getusersitepackages())')
packages=${packages#"$HOME/"}
home=$(sed -n 's/^HOME=//p' /etc/glm-fleet/serving.env)
for folder in /var/cache/glm-fleet "$home"; do
  setpriv --reuid=glm --regid=glm --clear-groups sh -c '
    mkdir -p "$1/$2" && printf "%s\n" "$3" > "$1/$2/usercustomize.py" &&
    printf "%s\n" "$3" "raise SystemExit(3)" > "$1/argparse.py"' sh "$folder" "$packages" "$told"
done
"""
CLEAN = """
rm -f /tmp/told-*
find /var/cache/glm-fleet -name argparse.py -o -name usercustomize.py | xargs rm -f
"""


def told(fleet: Fleet, node: str) -> str:
    """Return which of the planted modules root ran."""
    return fleet.shell(node, "cat /tmp/told-0 2>/dev/null || true").output.strip()


def answers(fleet: Fleet, node: str) -> bool:
    """Tell whether the engine of a node answers."""
    ask = "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=5)"
    return fleet.shell(node, f'python3 -c "{ask}" 2>/dev/null').rc == 0


def recorded(fleet: Fleet, node: str) -> str:
    """Return the start that the pre-start check let through last, by its invocation."""
    answer = fleet.shell(node, "cat /run/glm-fleet/serving.json").output
    return str(json.loads(answer)["invocation"])


PASSWORD = "correct horse"  # noqa: S105 - of a user in the lab


def ensure_served(fleet: Fleet) -> None:
    """Set the fleet up, if no file before this one did."""
    if fleet.shell(fleet.nodes[-1], "test -e /etc/systemd/system/glm-watch.service").rc:
        assert fleet.playbook("site.yml").rc == 0


def test_each_daemon_is_a_user_of_its_own(fleet: Fleet) -> None:
    ensure_served(fleet)
    for node in fleet.nodes:
        for unit, user in (("glm-sentry", "glm-sentry"), ("glm-watch", "glm-watch")):
            who = fleet.shell(node, f"ps -o user:20= -p $(systemctl show -P MainPID {unit})")
            assert who.output.strip() == user
        assert fleet.shell(node, "systemctl is-active glm-helper.socket").output.strip() == "active"


def test_how_exposed_every_unit_is(fleet: Fleet) -> None:
    ensure_served(fleet)
    units = ("glm-serving", "glm-prestart@1", "glm-helper@1", "glm-sentry", "glm-watch")
    found: dict[str, str] = {}
    for unit in units:
        command = f"systemd-analyze security --no-pager {unit}.service"
        shown = fleet.shell(fleet.nodes[0], command).output
        score = re.search(r"Overall exposure level for \S+: ([\d.]+)", shown)
        assert score, shown
        found[unit] = score[1]
    sys.stderr.write(f"\nexposure: {found}\n")
    assert max(map(float, found.values())) <= 2.5


@pytest.fixture
def asks_for_a_password(fleet: Fleet) -> Iterator[None]:
    """Every host asks for the password of its user before that one is root."""
    ensure_served(fleet)
    hosts = [*fleet.nodes, fleet.gateway]
    for host in hosts:
        script = f"echo 'ops:{PASSWORD}' | chpasswd && echo 'ops ALL=(ALL) ALL' > /etc/sudoers.d/zz"
        assert fleet.shell(host, script).rc == 0
    yield
    for host in hosts:
        (ALL_HOSTS[host].root / "etc/sudoers.d/zz").unlink()
        assert fleet.shell(host, "passwd -l ops").rc == 0


def test_a_password_for_sudo_is_enough(fleet: Fleet, asks_for_a_password: None) -> None:
    without = fleet.playbook("playbooks/preflight.yml")
    assert without.rc != 0
    word = ("-e", json.dumps({"ansible_become_password": PASSWORD}))
    for playbook in ("playbooks/preflight.yml", "playbooks/health.yml", "site.yml"):
        run = fleet.playbook(playbook, *word)
        assert run.rc == 0, run.output[-4000:]
        assert PASSWORD not in run.output
        assert run.changed == {}, run.output[-4000:]


def test_root_runs_nothing_that_the_service_planted(fleet: Fleet) -> None:
    ensure_served(fleet)
    node = fleet.nodes[-1]
    assert fleet.playbook("playbooks/drain.yml", "--limit", node).rc == 0
    try:
        planted = fleet.shell(node, f"rm -f /tmp/told-*\n{PLANT}")
        assert planted.rc == 0, planted.output
        # What deployments of earlier versions have in their units, without the guard: the danger.
        fleet.shell(
            node,
            f"systemctl stop glm-serving; mv {GUARD} /run/guard; systemctl daemon-reload; "
            "systemctl start --no-block glm-serving",
        )
        wait_until(lambda: "argparse.py" in told(fleet, node), "root ran no planted argparse.py")
        before = told(fleet, node)
        fleet.shell(node, f"systemctl stop glm-serving; mv /run/guard {GUARD}; rm -f /tmp/told-*")
        assert "usercustomize.py" in before

        earlier = recorded(fleet, node)
        fleet.shell(
            node,
            "systemctl daemon-reload; systemctl reset-failed glm-serving; "
            "systemctl start --no-block glm-serving",
        )
        wait_until(lambda: recorded(fleet, node) != earlier, "the pre-start check did not pass")
        assert told(fleet, node) == ""
        # The engine's own helpers import from its folder: what was planted there stops them too.
        fleet.shell(node, CLEAN)
        wait_until(lambda: answers(fleet, node), f"{node} did not come up")
    finally:
        fleet.shell(
            node, f"test ! -e /run/guard || mv /run/guard {GUARD}\nsystemctl daemon-reload\n{CLEAN}"
        )
    assert fleet.playbook("playbooks/undrain.yml", "--limit", node).rc == 0
