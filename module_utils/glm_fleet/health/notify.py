# SPDX-License-Identifier: Apache-2.0
"""Tells a webhook and the journal when a host's verdict changes, each change once.

What was told stands in a file with what has still to be told: a webhook that is down gets
it with the next check, in order.

Run as a program after a health check: ``python3 -m glm_fleet.notify --help``.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import sys
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Callable, TypedDict

from ..core.decode import Words, read
from ..core.errors import FleetError
from ..core.files import write_atomically
from .verdict import Verdict

_TIMEOUT_S = 15.0
# A webhook that is down for days must not fill the disk.
_MOST_WAITING = 1000
_LEVELS = {"healthy": 5, "degraded": 4, "broken": 3, "unknown": 3}
Post = Callable[[Mapping[str, Any]], None]


class _Row(TypedDict):
    name: Words
    verdict: Verdict
    reasons: Sequence[Words]
    next_step: Words


class _Report(TypedDict):
    time: Words
    nodes: Sequence[_Row]
    gateways: Sequence[_Row]


class _State(TypedDict):
    """The verdict of each host that was told last, and the events that wait for the webhook."""

    told: Mapping[str, Words]
    waiting: Sequence[Mapping[str, Any]]


def find_events(report: Mapping[str, Any], told: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return one event for each host whose verdict is not what was told last.

    A host that was never told of is taken for healthy; one that left the fleet says nothing.
    """
    events = []
    for host in (*report["nodes"], *report["gateways"]):
        name, verdict = host["name"], host["verdict"]
        before = told.get(name, "healthy")
        if verdict == before:
            continue
        text = f"{name}: {before} -> {verdict}"
        if host["reasons"]:
            text += f": {'; '.join(host['reasons'])}. What to do: {host['next_step']}"
        events.append(
            {
                "id": f"{report['time']} {name} {verdict}",
                "time": report["time"],
                "host": name,
                "before": before,
                "after": verdict,
                "reasons": list(host["reasons"]),
                "next_step": host["next_step"],
                # What chat systems show of a webhook.
                "text": text,
            }
        )
    return events


def notify(
    report: Mapping[str, Any], state_file: Path, post: Post | None, say: Callable[[str], None]
) -> list[str]:
    """Tell the journal (``say``) what is new, and the webhook everything that waits.

    Returns what the webhook said against it. What it did not take waits for the next call.
    """
    state = _load(state_file)
    events = find_events(report, state["told"])
    state["told"] = {
        host["name"]: host["verdict"] for host in (*report["nodes"], *report["gateways"])
    }
    state["waiting"] = [*state["waiting"], *(events if post else ())][-_MOST_WAITING:]
    # Saved before anything is sent: a run that is killed while it sends must not send twice.
    _save(state_file, state)
    for event in events:
        say(f"<{_LEVELS[event['after']]}>{event['text']}")
    while post and state["waiting"]:
        try:
            post(state["waiting"][0])
        except FleetError as error:
            return [str(error)]
        state["waiting"] = state["waiting"][1:]
        _save(state_file, state)
    return []


def webhook(url: str) -> Post:
    """Return what posts an event as JSON to ``url``, which may hold a secret: never shown."""

    def post(event: Mapping[str, Any]) -> None:
        try:
            request = urllib.request.Request(  # noqa: S310
                url,
                data=json.dumps(event).encode(),
                headers={"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:  # noqa: S310
                answer.read()
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise FleetError(
                "The webhook did not take a change of state",
                expected="an HTTP status below 300",
                found=str(error).replace(url, "(the webhook)"),
                remedy="check GLM_FLEET_WEBHOOK; the change waits for the next check",
            ) from error

    return post


def _load(path: Path) -> _State:
    try:
        return read(_State, path)
    except (FileNotFoundError, FleetError):
        return {"told": {}, "waiting": []}


def _save(path: Path, state: _State) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(state, indent=1) + "\n", mode=0o600)


def main(argv: Sequence[str] | None = None) -> int:
    """Tell, and return the exit status for the unit."""
    parser = argparse.ArgumentParser(
        description="Tells changes of verdict to the journal and to the URL in GLM_FLEET_WEBHOOK."
    )
    parser.add_argument("--report", type=Path, required=True, help="fleet.json")
    parser.add_argument("--state", type=Path, required=True, help="what was told so far")
    options = parser.parse_args(argv)
    url = os.environ.get("GLM_FLEET_WEBHOOK", "")
    try:
        report = read(_Report, options.report)
    except (FileNotFoundError, FleetError) as error:
        sys.stderr.write(f"<3>{options.report} cannot be read: {error}\n")
        return 1
    problems = notify(
        report,
        options.state,
        webhook(url) if url else None,
        lambda line: print(line, flush=True),
    )
    sys.stderr.writelines(f"<3>{problem}\n" for problem in problems)
    return 1 if problems else 0
