# SPDX-License-Identifier: Apache-2.0
"""A release that cannot run is known before its weights are here, and nothing is switched to it."""

from __future__ import annotations

import json
import re
import time

import pytest

from .conftest import Fleet, Run, say
from .load import under_load
from .test_upgrade import assert_no_request_was_lost, ready, release, row, running

pytestmark = [pytest.mark.fleet, pytest.mark.long]

# On two processors as many sequences at once as a node of the lab can read in half a minute.
REHEARSE = ["-e", "serve_rehearsal=auto", "-e", "serving_max_num_seqs=8"]
CAUSE = "CUDA error 802: system not yet initialized"
REHEARSED = re.compile(r"rehearsed in (\d+) s")
LEFT = (
    "ls /run/systemd/system/glm-rehearsal.service /run/glm-fleet/rehearsal "
    "/var/lib/glm-fleet/rehearsal 2>/dev/null; systemctl is-active glm-rehearsal.service"
)


def assert_nothing_is_left(fleet: Fleet, node: str) -> None:
    assert fleet.shell(node, LEFT).output.split() == ["inactive"]


def records(fleet: Fleet, node: str) -> list[dict[str, object]]:
    text = fleet.shell(node, "cat /var/lib/glm-fleet/rehearsals.json").output
    found: list[dict[str, object]] = json.loads(text)
    return found


def known_after(run: Run, begun: float, fleet: Fleet, node: str) -> float:
    """Return seconds from the drain of the canary until the node that failed was going back."""
    script = f"journalctl -u glm-serving -u glm-rehearsal -o short-unix --since @{int(begun)}"
    lines = fleet.shell(node, script).output.splitlines()
    stops = [float(line.split()[0]) for line in lines if "Stopping glm-serving" in line]
    dies = [float(line.split()[0]) for line in lines if CAUSE in line]
    assert stops, run.output[-3000:]
    assert dies, run.output[-3000:]
    return dies[0] - stops[0]


def test_no_weights_are_fetched_for_a_release_that_cannot_run(fleet: Fleet) -> None:
    reset = fleet.playbook("playbooks/reset.yml", "-e", "reset_confirm=reset")
    assert reset.rc == 0, reset.output[-4000:]
    canary = fleet.nodes[0]
    run = fleet.playbook("site.yml", *REHEARSE, *release("crash"))
    assert run.rc != 0
    assert CAUSE in run.output
    assert "its rehearsal failed" in run.output
    assert "Fetch the weights once, to every node" not in run.output
    for node in fleet.nodes:
        weights = fleet.shell(node, "find /srv -name '*.safetensors' | wc -l").output
        assert weights.strip() == "0", f"{node} has weights"
        active = fleet.shell(node, "systemctl is-active glm-serving; ls /opt/glm-fleet/current")
        assert active.output.split()[0] == "inactive"
        assert "No such file" in active.output
    assert_nothing_is_left(fleet, canary)
    assert [each["passed"] for each in records(fleet, canary)] == [False]


def test_a_first_run_rehearses_once_and_serves(fleet: Fleet) -> None:
    canary = fleet.nodes[0]
    run = fleet.playbook("site.yml", *REHEARSE)
    assert run.rc == 0, run.output[-6000:]
    before = run.output.index("Fetch the weights once, to every node")
    found = REHEARSED.search(run.output[:before])
    assert found, "nothing was rehearsed before the weights were fetched"
    say(f"rehearsed in {found[1]} s before the weights were fetched")
    # Known by then, so the canary's turn rehearses nothing.
    assert not REHEARSED.search(row(run, canary, "serves"))
    assert ready(fleet) == fleet.nodes
    assert_nothing_is_left(fleet, canary)
    again = fleet.playbook("site.yml", *REHEARSE)
    assert (again.rc, again.changed) == (0, {})
    assert not REHEARSED.search(again.output)


def test_a_good_release_is_rehearsed_by_the_canary_alone(fleet: Fleet) -> None:
    canary = fleet.nodes[0]
    check = fleet.playbook("playbooks/upgrade.yml", *REHEARSE, "--check")
    assert (check.rc, check.changed) == (0, {})
    with under_load(fleet, "upgrade with a rehearsal") as load:
        run = fleet.playbook("playbooks/upgrade.yml", *REHEARSE, *release("second"))
        assert run.rc == 0, run.output[-6000:]
    assert_no_request_was_lost(load)
    assert "rehearsal: asks 8 sequences of 2049 to" in run.output
    found = REHEARSED.search(" ".join(run.output.split()))
    assert found
    assert run.output.count("rehearses deployment") == 1
    say(f"rehearsed in {found[1]} s in the canary's turn")
    assert [each["passed"] for each in records(fleet, canary)][-1] is True
    assert len(set(running(fleet).values())) == 1
    assert ready(fleet) == fleet.nodes
    assert_nothing_is_left(fleet, canary)
    again = fleet.playbook("playbooks/upgrade.yml", *REHEARSE, *release("second"))
    assert (again.rc, again.changed) == (0, {})


@pytest.mark.parametrize("mode", ["auto", "never"])
def test_a_release_that_dies_at_its_start_is_refused(fleet: Fleet, mode: str) -> None:
    """With the rehearsal, and the time without it beside."""
    canary = fleet.nodes[0]
    before = running(fleet)
    begun = time.time()
    with under_load(fleet, f"upgrade to a release that dies, rehearsal {mode}") as load:
        run = fleet.playbook(
            "playbooks/upgrade.yml", *REHEARSE, "-e", f"serve_rehearsal={mode}", *release("crash")
        )
    assert run.rc != 0
    assert_no_request_was_lost(load)
    assert CAUSE in run.output
    assert running(fleet) == before
    assert ready(fleet) == fleet.nodes
    said = row(run, canary, "rolled back")
    assert ("the rehearsal failed" in " ".join(run.output.split())) == (mode == "auto"), said
    for node in fleet.nodes[1:]:
        row(run, node, "untouched")
        assert load.absence(node) == []
    (span,) = load.absence(canary)
    known = known_after(run, begun, fleet, canary)
    say(
        f"serve_rehearsal={mode}: known {known:.0f} s after the engine was stopped, "
        f"{canary} was out for {span[1] - span[0]:.0f} s"
    )
    assert_nothing_is_left(fleet, canary)


def test_a_node_that_serves_is_drained_for_a_rehearsal_by_hand(fleet: Fleet) -> None:
    fleet.serve()
    node = fleet.nodes[1]
    invocation = "systemctl show -P InvocationID glm-serving"
    others = {each: fleet.shell(each, invocation).output for each in fleet.nodes if each != node}
    with under_load(fleet, "a rehearsal by hand") as load:
        run = fleet.playbook(
            "playbooks/rehearse.yml", *REHEARSE, *release("second"), "-e", f"serve_canary={node}"
        )
        assert run.rc == 0, run.output[-6000:]
    assert_no_request_was_lost(load)
    assert REHEARSED.search(run.output)
    assert ready(fleet) == fleet.nodes
    assert {each: fleet.shell(each, invocation).output for each in others} == others
    assert_nothing_is_left(fleet, node)
