# SPDX-License-Identifier: Apache-2.0
"""What a host does with its deployments: stage one, say what there is, switch to one."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.http import local_http
from ..core.runner import Runner
from ..release import environment
from ..release.installed import find_damage, read_note
from ..serving.activation import (
    activate,
    compare,
    environment_changes,
    install_policy,
    mend_links,
)
from ..serving.command import parser_options
from ..serving.deployment import UNIT, Deployment, Deployments
from ..serving.policy import parse_policy
from ..serving.record import read_running
from ..serving.startup import unproven
from . import readiness

# Why a node is restarted that runs what it should.
AGAIN = "its repair was asked for"


@dataclass(frozen=True)
class Deploying:
    """The deployments of this host, for the module `deployment`; check mode changes nothing.

    What each returns stands in the module's documentation. All raise `FleetError`.
    """

    run: Runner
    deployments: Deployments
    check_mode: bool = False

    def stage(self, wanted: Deployment) -> dict[str, Any]:
        """Keep a deployment on the host, and say what it would change."""
        before = self.deployments.find(self.deployments.current())
        words = compare(read_running(self.run, UNIT), wanted, before)
        changed = self.deployments.stage(wanted, check_mode=self.check_mode)
        names = environment_changes(before.environment if before else "", wanted.environment)
        return {
            "changed": changed,
            "id": wanted.id,
            "wanted": wanted.summary(),
            "differences": words,
            "diff": {
                "before_header": f"{UNIT} that is active",
                "after_header": f"{UNIT} that is staged",
                "before": before.unit if before else "",
                "after": wanted.unit,
                "prepared": f"{names}\n" if not before or names != "the environment" else "",
            },
        }

    def find(
        self,
        *,
        target: str = "",
        rungs: Sequence[str] = (),
        retry: bool = False,
        again: bool = False,
    ) -> dict[str, Any]:
        """Say what runs, what is wanted and what a restart would change.

        ``target`` names what to go back to; without it ``rungs`` are the ids to try, of which
        those that are known to fail here are skipped unless ``retry``. ``again`` asks for a new
        start of a node that runs what it should.
        """
        running = read_running(self.run, UNIT)
        deployments = self.deployments
        current = deployments.find(deployments.current())
        skipped: list[Deployment] = []
        ladder = [self._named(target)] if target else list(rungs)
        if not target and retry and not self.check_mode:
            for identifier in rungs:
                deployments.forgive(identifier)
        while not target and not retry and len(ladder) > 1 and deployments.refused(ladder[0]):
            skipped.append(deployments.read(ladder.pop(0)))
        wanted = deployments.find(ladder[0]) if ladder else None
        return {
            "changed": False,
            "running": running,
            "current": current.summary() if current else {},
            "wanted": wanted.summary() if wanted else {},
            "ladder": [each for each in ladder if each],
            "skipped_rungs": [
                {"cuda_graphs": each.cuda_graphs, "reason": deployments.refused(each.id)}
                for each in skipped
            ],
            "differences": (
                self._differences(running, wanted, current) or ([AGAIN] if again else [])
                if wanted
                else []
            ),
            "back": deployments.before(wanted.id) if wanted else "",
            "starts": deployments.starts(),
        }

    def options(self) -> list[str]:
        """Return the options that vLLM's parser has in the release that is active."""
        return parser_options(self.deployments.places.release_link)

    def switch(
        self,
        identifier: str,
        *,
        releases: Path,
        rungs: Sequence[str] = (),
        refuse: str = "",
        reason: str = "",
        disproved: str = "",
        again: bool = False,
    ) -> dict[str, Any]:
        """Switch to a deployment where that changes anything.

        ``releases`` has the artifacts from which a damaged environment is built again. ``refuse``
        is remembered as one that fails here, for ``reason``; ``rungs`` are kept. ``disproved``
        was attested, and turned out not to be right. ``again`` starts it anew where it runs.
        """
        deployments = self.deployments
        wanted = deployments.read(identifier)
        with contextlib.nullcontext() if self.check_mode else deployments.switching():
            current = deployments.find(deployments.current())
            words = self._differences(read_running(self.run, UNIT), wanted, current)
            words = words or ([AGAIN] if again else [])
            result: dict[str, Any] = {
                "id": identifier,
                "deployment": wanted.summary(),
                "changed": bool(words),
                "seconds": {},
            }
            if self.check_mode:
                return result
            if refuse:
                deployments.refuse(refuse, reason)
            if disproved:
                deployments.note_disproved(disproved)
            if words and self._damage(wanted):
                # The node is drained: what still runs from the old one loses nothing.
                self._rebuild(releases, wanted)
            if words:
                attested_now = readiness.answer() == "up"
                result["seconds"] = activate(
                    self.run, deployments, identifier, attested_now=attested_now
                )
        deployments.retire([identifier, *([refuse] if refuse else []), *rungs])
        return result

    def renew(self, identifier: str) -> tuple[dict[str, Any], list[str]]:
        """Bring policy and links of a deployment that runs; return what was mended too, in words.

        Where another one runs nothing is done: its policy comes with its switch.
        """
        wanted, places = self.deployments.read(identifier), self.deployments.places
        if compare(read_running(self.run, UNIT), wanted, None):
            return {"changed": False, "id": wanted.id}, []
        mended = mend_links(wanted, places, check_mode=self.check_mode)
        changed = install_policy(wanted, places, check_mode=self.check_mode)
        return {"changed": changed or bool(mended), "id": wanted.id}, mended

    def _named(self, target: str) -> str:
        """Return the id of what to go back to, '' where there is nothing."""
        if target != "before":
            return self.deployments.named(target)
        # Without a current deployment, going back starts from the last one that was attested. Where
        # the current one is gone, what is before it is not it.
        served = (self.deployments.attested() or [""])[-1]
        return self.deployments.before(self.deployments.current() or served)

    def _damage(self, wanted: Deployment) -> list[str]:
        """Say what is wrong with the environment that a deployment starts from."""
        damage = find_damage(self.deployments.places.releases / wanted.release)
        if not damage:
            return []
        named = ", ".join(f"{each.path} {each.reason}" for each in damage[:2])
        more = f" and {len(damage) - 2} more" if len(damage) > 2 else ""
        return [f"its environment is damaged: {named}{more}"]

    def _differences(
        self, running: dict[str, Any], wanted: Deployment, before: Deployment | None
    ) -> list[str]:
        """Say what a restart would change, and when only a restart can prove or mend what runs."""
        words = compare(running, wanted, before)
        if words:
            return words
        policy = parse_policy(wanted.policy)
        http = local_http(policy["port"], address=policy["address"], timeout_s=5.0)
        if unproven(self.run, http, running, policy["required"]):
            return ["its journal and the record of its attestation are gone: nothing proves it"]
        return self._damage(wanted)

    def _rebuild(self, releases: Path, wanted: Deployment) -> None:
        places = self.deployments.places
        home = places.releases / wanted.release
        environment.ensure(
            self.run,
            releases / wanted.release,
            home,
            user=places.group,
            compile_bytecode=bool(read_note(home).get("compile_bytecode", True)),
        )
