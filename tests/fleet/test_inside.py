# SPDX-License-Identifier: Apache-2.0
"""A compromised engine stays the service's user: what it plants is never run by root."""

from __future__ import annotations

import json

import pytest

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


def test_root_runs_nothing_that_the_service_planted(fleet: Fleet) -> None:
    if fleet.shell(fleet.nodes[-1], "test -e /etc/glm-fleet/serving.env").rc:
        assert fleet.playbook("site.yml").rc == 0
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
