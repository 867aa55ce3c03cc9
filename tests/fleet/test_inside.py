# SPDX-License-Identifier: Apache-2.0
"""A compromised engine stays the service's user: what it plants is never run by root."""

from __future__ import annotations

import time

import pytest

from .conftest import Fleet

# Long: its first half, that the danger is real without the guard, was not yet seen in the lab.
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
    mkdir -p "$1/$2" && echo "$3" > "$1/$2/usercustomize.py" &&
    { echo "$3"; echo "raise SystemExit(3)"; } > "$1/argparse.py"' sh "$folder" "$packages" "$told"
done
"""
CLEAN = """
rm -f /tmp/told-*
find /var/cache/glm-fleet -name argparse.py -o -name usercustomize.py | xargs rm -f
"""


def told(fleet: Fleet, node: str) -> str:
    """Return what was run by root, after a start has had its time."""
    time.sleep(6)
    return fleet.shell(node, "cat /tmp/told-0 2>/dev/null || true").output.strip()


def wait_until_up(fleet: Fleet, node: str, seconds: float = 240) -> None:
    """Wait until the engine of a node answers."""
    end = time.monotonic() + seconds
    ask = "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=5)"
    while fleet.shell(node, f'python3 -c "{ask}" 2>/dev/null').rc:
        assert time.monotonic() < end, f"{node} did not come up"
        time.sleep(2)


def test_root_runs_nothing_that_the_service_planted(fleet: Fleet) -> None:
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
        before = told(fleet, node)
        fleet.shell(node, f"systemctl stop glm-serving; mv /run/guard {GUARD}; rm -f /tmp/told-*")
        assert "argparse.py" in before
        assert "usercustomize.py" in before

        fleet.shell(
            node,
            "systemctl daemon-reload; systemctl reset-failed glm-serving; "
            "systemctl start --no-block glm-serving",
        )
        assert told(fleet, node) == ""
        show = "systemctl show glm-serving -P"
        script = f"{show} ActiveState; {show} InvocationID; cat /run/glm-fleet/serving.json"
        now = fleet.shell(node, script).output
        active, invocation = now.split()[:2]
        assert active == "active", now
        assert f'"invocation": "{invocation}"' in now
        # The engine's own helpers import from its folder: what was planted there stops them too.
        fleet.shell(node, CLEAN)
        wait_until_up(fleet, node)
    finally:
        fleet.shell(node, CLEAN)
    assert fleet.playbook("playbooks/undrain.yml", "--limit", node).rc == 0
