# SPDX-License-Identifier: Apache-2.0
"""The controller's part of a distribution: starts the agents, carries torrents, shows progress.

Every host of the task has a worker of its own, with the connection that Ansible has. The
workers meet in a folder of the run on the controller: what one host made, the others find
there, and each says how its host is.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ansible import constants
from ansible.errors import AnsibleActionFail
from ansible.utils.color import ANSIBLE_COLOR
from ansible.utils.display import Display

sys.path.append(str(Path(__file__).resolve().parents[1] / "plugin_utils"))

from glm_background import BackgroundAction, Work
from glm_fleet.artifact.manifest import Manifest, parse_manifest
from glm_fleet.core.decode import parse
from glm_fleet.core.errors import FleetError
from glm_fleet.core.progress import Progress, Reporter, bar
from glm_fleet.transfer.rendezvous import AgentAnswer, Meeting, Record
from glm_fleet.transfer.torrent import bundles, torrent_roots

_display = Display()
_FIRST_WAIT_S = 0.5
_WAIT_S = 2.0
# A push says nothing for as long as one file takes.
_PUSH_LEASE_S = 6 * 3600


class ActionModule(BackgroundAction):
    """Brings one artifact to one host, while other workers do so for the others."""

    TRANSFERS_FILES = True

    def act(self, arguments: dict[str, Any], variables: dict[str, Any]) -> dict[str, Any]:
        """Return the module's result, or that of the whole distribution on this host."""
        fetch = dict(arguments.pop("fetch", None) or {})
        if arguments.get("state") != "distributed":
            return self.module("swarm", arguments, variables)
        self._host = str(variables.get("inventory_hostname", ""))
        self._vars = variables
        planned = self.module(
            "swarm",
            {
                "state": "planned",
                "root": arguments["root"],
                "manifests": [arguments["manifest"]],
            },
            variables,
        )
        if planned.get("failed"):
            return planned
        published = bool(planned["published"])
        if self._task.check_mode:
            return {"changed": not published, "received": 0}
        forks = int(variables.get("ansible_forks", 5))
        return self._distribute(arguments, {} if published else fetch, published, forks)

    def _distribute(
        self, arguments: dict[str, Any], fetch: dict[str, Any], published: bool, forks: int
    ) -> dict[str, Any]:
        base = Path(constants.DEFAULT_LOCAL_TMP)
        run = f"{base.name}-{arguments['manifest']['id']}"
        meeting = Meeting(
            base / f"swarm-{arguments['manifest']['id']}",
            self._host,
            list(arguments["hosts"]),
            stall_timeout=float(arguments.get("stall_timeout", 120)),
            check=_follows(parse_manifest(arguments["manifest"])),
        )
        step = {**arguments, "run": run}
        record = Record()
        try:
            started = self.module("swarm", {**step, "state": "started"}, self._vars)
            if started.get("failed"):
                return started
            self._command = " ".join(
                [
                    f"PYTHONPATH={shlex.quote(str(arguments['library']))}",
                    shlex.quote(started["python"]),
                    "-B -m glm_fleet.swarm ask",
                ]
            )
            self._push(run, meeting, arguments, started)
            # After the agent: it has made the folder that the files are fetched to.
            work = self.start_work("hub_snapshot", fetch, self._vars) if fetch else None
            record = self._attend(run, meeting, arguments, work, forks)
        finally:
            # The others do not wait for this host any more, whatever happened.
            meeting.say(record.ended())
        stopped = self.module("swarm", {**step, "state": "stopped"}, self._vars)
        result = {"changed": not published, "received": record.received, "warnings": record.notes}
        if record.standing == "published":
            return {**result, "failed": bool(stopped.get("failed")), **_message(stopped)}
        return {**result, "failed": True, **record.failure}

    def _ask(self, request: Mapping[str, Any]) -> AgentAnswer:
        # Not a module: this happens every other second, and is one light process on the node.
        done = self._low_level_execute_command(
            self._command, in_data=json.dumps(request).encode(), sudoable=True
        )
        line = (done.get("stdout", "").strip().splitlines() or [""])[-1]
        try:
            return parse(AgentAnswer, line, what="The answer of the swarm's agent")
        except FleetError as error:
            said = (done.get("stderr") or "").strip()[-500:]
            raise AnsibleActionFail(
                f"{error} It said: {said or line[:500] or 'nothing'}. "
                "What to do: check Python and sudo on the host, then run again."
            ) from error

    def _push(
        self, run: str, meeting: Meeting, arguments: dict[str, Any], started: dict[str, Any]
    ) -> None:
        """Push file by file: each travels on to the others as soon as it is there."""
        missing = started["missing"]
        if not missing:
            return
        source = Path(arguments["push"])
        total = sum(int(each["size"]) for each in missing)
        done, begun = 0, time.monotonic()
        reporter = Reporter(f"{self._host} (first copy)", terminal=False)
        for number, entry in enumerate(missing):
            path = source / entry["path"]
            if not path.is_file():
                raise AnsibleActionFail(
                    f"The artifact on the controller is not complete. Expected: {path}. "
                    "Found: no such file. What to do: run playbooks/release.yml again."
                )
            meeting.say(Record(pushing=True, progress={"what": "pushed", "done": done}))
            self._ask({"run": run, "lease": _PUSH_LEASE_S})
            self._connection.put_file(str(path), f"{started['incoming']}/{number}")
            done += int(entry["size"])
            answer = self._ask(
                self._request(run, meeting, 0) | {"arrived": {number: entry["path"]}}
            )
            self._keep(meeting, answer)
            rate = done / max(0.001, time.monotonic() - begun)
            text = reporter.show(Progress("pushed over SSH", done, total, rate))
            if text and done < total:
                _display.display(text, newline=False)

    def _keep(self, meeting: Meeting, answer: AgentAnswer) -> None:
        for reason in meeting.keep(answer.get("torrents", {})):
            _display.warning(f"{self._host} offers a torrent that nobody is given. {reason}")

    def _request(self, run: str, meeting: Meeting, wait: float) -> dict[str, Any]:
        return {"run": run, "wait": wait, "torrents": meeting.fresh(), "have": meeting.known()}

    def _attend(
        self,
        run: str,
        meeting: Meeting,
        arguments: dict[str, Any],
        work: Work | None,
        forks: int,
    ) -> Record:
        """Carry torrents and watch until every host of the task has ended."""
        hosts = arguments["hosts"]
        leads = bool(ANSIBLE_COLOR) and self._host == hosts[0]
        reporter = Reporter(self._host, terminal=False)
        fetched = Reporter(f"{self._host} (hub)", terminal=False)
        drawn = 0
        wait = _FIRST_WAIT_S
        while True:
            answer = self._ask(self._request(run, meeting, wait))
            self._keep(meeting, answer)
            record = Record.of(answer)
            if work:
                record = self._beside(record, work)
            meeting.say(record)
            others = meeting.others()
            if record.standing == "working":
                hopeless = meeting.hopeless(record, others)
                if hopeless:
                    return record.failed(hopeless.as_fail())
            if not record.progress:
                return record
            waits = len(hosts) > forks and record.standing != "working" and not record.busy
            if waits or (record.has_ended and all(each.has_ended for each in others.values())):
                return record
            wait = _FIRST_WAIT_S if record.unknown else _WAIT_S
            progress = Progress(**record.progress)
            if leads:
                drawn = _draw({self._host: record, **others}, drawn)
            elif not ANSIBLE_COLOR and record.standing == "working":
                text = reporter.show(progress)
                if record.fetching:
                    text += fetched.show(Progress(**record.fetching))
                if text:
                    _display.display(text, newline=False)

    def _beside(self, record: Record, work: Work) -> Record:
        """Add to a host's record how it fetches from the hub, or that it could not."""
        result = self.look_at(work, self._vars)
        if result is None:
            at_work = work.progress or Progress("fetching from the hub", 0, 0, 0.0)
            return replace(record, busy=True, fetching=vars(at_work))
        failed = result.get("failed") and not record.has_ended
        return record.failed({"msg": result.get("msg", "no reason given")}) if failed else record


def _follows(manifest: Manifest) -> Callable[[str, bytes], object]:
    """Return the check of a torrent against the manifest, by the name of its bundle."""
    parts = {bundle.name: bundle for bundle in bundles(manifest)}

    def check(name: str, torrent: bytes) -> object:
        if name not in parts:
            raise FleetError(f"There is no bundle {name} in {manifest.id}")
        return torrent_roots(torrent, manifest.id, parts[name])

    return check


def _message(stopped: Mapping[str, Any]) -> dict[str, Any]:
    return {"msg": stopped["msg"]} if stopped.get("failed") else {}


def _draw(records: Mapping[str, Record], drawn: int) -> int:
    """Draw a bar for every host over the ones drawn before; return the number of lines."""
    rows: list[tuple[str, Mapping[str, Any]]] = []
    for host, record in sorted(records.items()):
        rows += [(host, record.progress), (f"{host} (hub)", record.fetching)]
    lines = [
        f"\r\033[K  {name:16} {bar(Progress(**progress))}\n"
        for name, progress in rows
        if progress.get("total")
    ]
    _display.display((f"\033[{drawn}A" if drawn else "") + "".join(lines), newline=False)
    return len(lines)
