# SPDX-License-Identifier: Apache-2.0
"""glm-fleet itself is upgraded: what the version before set up goes on serving, and goes back."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from .conftest import INVENTORY, ROOT, Fleet, Run, lab

pytestmark = [pytest.mark.fleet, pytest.mark.long]

# The version before. A release of glm-fleet puts its own commit here once it is tagged.
BEFORE = "7a1c8e4ebd9f1e6f5ae7c96be77a9b01de7f80c9"
# The release that the version before makes: the lab's recipe has a correction that it did not know,
# and without it the proof of today finds what that correction mends.
SAME_RELEASE = [
    "-e",
    json.dumps({"release_patches": [], "release_known_faults": [], "release_proofs": False}),
]
# Something to go back from. The acceptance of a node finds the same fault as the proof.
FLAGS = [*SAME_RELEASE, "-e", "serving_max_model_len=3072", "-e", "acceptance_enabled=false"]


def git(*arguments: str) -> Run:
    done = subprocess.run(
        ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False
    )
    return Run(done.returncode, done.stdout + done.stderr)


@pytest.fixture(scope="module")
def before(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """The version before, in a checkout of its own, and a lab fleet that it did not see yet."""
    if git("cat-file", "-e", f"{BEFORE}^{{commit}}").rc != 0:
        pytest.fail(
            f"The version before is not in this clone. Expected: commit {BEFORE} in its history. "
            "Found: a shallow clone, or another repository. What to do: git fetch --unshallow."
        )
    if any(fleet.shell(node, "test -e /etc/glm-fleet").rc == 0 for node in fleet.nodes):
        lab("down")
        lab("up", "--nodes", str(len(fleet.nodes)))
    folder = tmp_path_factory.mktemp("before") / "glm-fleet"
    added = git("worktree", "add", "--detach", str(folder), BEFORE)
    assert added.rc == 0, added.output
    try:
        inventory = yaml.safe_load((INVENTORY / "hosts.yml").read_text())
        variables = inventory["all"]["vars"]
        for name in set(variables) - known(folder):
            if not name.startswith(("ansible_", "lab_")):
                del variables[name]
        (folder / "inventory/lab/hosts.yml").write_text(yaml.safe_dump(inventory))
        yield Fleet(folder)
    finally:
        removed = git("worktree", "remove", "--force", str(folder))
        assert removed.rc == 0, removed.output


def known(checkout: Path) -> set[str]:
    """Return the variables that a version knows: an operator gives it no others."""
    specs = [
        yaml.safe_load(path.read_text())["argument_specs"]
        for path in checkout.glob("roles/*/meta/argument_specs.yml")
    ]
    return {name for spec in specs for entry in spec.values() for name in entry.get("options", {})}


def starts(fleet: Fleet) -> dict[str, str]:
    """Return the start of the engine that each node runs; another start has another id."""
    script = "systemctl show -P ActiveState -P InvocationID glm-serving | tr '\\n' ' '"
    return {node: fleet.shell(node, script).output.strip() for node in fleet.nodes}


def deployment(fleet: Fleet, node: str) -> str:
    """Return the id of the deployment that a node runs."""
    script = "basename $(readlink /etc/glm-fleet/deployments/current)"
    return fleet.shell(node, script).output.strip()


def staged(fleet: Fleet, node: str, identifier: str) -> str:
    """Return the digests of what systemd runs of a deployment; the record beside it may grow."""
    script = f"cd /etc/glm-fleet/deployments/{identifier} && sha256sum *.service *.env"
    done = fleet.shell(node, script)
    assert done.rc == 0, done.output
    return done.output


def assert_serves(fleet: Fleet) -> None:
    """See that health finds nothing wrong, and that every node answers."""
    health = fleet.playbook("playbooks/health.yml")
    assert health.rc == 0, health.output[-6000:]
    report = json.loads((ROOT / "reports/fleet.json").read_text())
    verdicts = {each["name"]: each["verdict"] for each in report["nodes"]}
    assert verdicts == dict.fromkeys(fleet.nodes, "healthy")
    answers = [fleet.chat() for _ in range(5 * len(fleet.nodes))]
    assert {each.status for each in answers} == {200}
    assert {each.node for each in answers} == set(fleet.nodes)


def test_a_fleet_of_the_version_before_goes_on_and_goes_back(fleet: Fleet, before: Fleet) -> None:
    run = before.playbook("site.yml")
    assert run.rc == 0, run.output[-6000:]
    were = starts(fleet)
    assert all("active" in each for each in were.values()), were
    first = {node: deployment(fleet, node) for node in fleet.nodes}
    kept = {node: staged(fleet, node, first[node]) for node in fleet.nodes}

    run = fleet.playbook("site.yml", *SAME_RELEASE)
    assert run.rc == 0, run.output[-6000:]
    assert starts(fleet) == were, "an engine was restarted that runs what it should"
    assert_serves(fleet)

    run = fleet.playbook("playbooks/upgrade.yml", *FLAGS)
    assert run.rc == 0, run.output[-6000:]
    assert not set(starts(fleet).values()) & set(were.values())
    back = fleet.playbook("playbooks/rollback.yml")
    assert back.rc == 0, back.output[-6000:]
    # What runs is what the version before staged, to the last byte.
    assert {node: deployment(fleet, node) for node in fleet.nodes} == first
    assert {node: staged(fleet, node, first[node]) for node in fleet.nodes} == kept
    assert not set(starts(fleet).values()) & set(were.values())
    assert_serves(fleet)
