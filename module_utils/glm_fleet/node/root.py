# SPDX-License-Identifier: Apache-2.0
"""What root does for the watchdog and the readiness agent: see `helper`.

systemd listens on the socket and starts this program anew for each question. It reads one line of
JSON, looks at who asks, answers with one line, and ends. What is signalled, and whose processes
are read, is on its command line, which is root's.

Run as a program: ``python3 -I /opt/glm-fleet/lib/glm_fleet helper``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import pwd
import socket
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..core.decode import parse
from ..core.errors import FleetError
from ..core.http import local_http
from ..core.procfs import Process, list_processes
from ..core.runner import Runner, run_program
from ..core.systemd import unit_state
from ..serving.attestation import attest, wanted_by
from ..serving.deployment import ENVIRONMENT, POLICY, UNIT, Deployments, Places
from ..serving.kept_answers import Known
from ..serving.policy import read_api_key, read_policy
from .helper import READINESS_USER, STACK_TIMEOUT_S, WATCH_USER, Answer, Question
from .prestart import left_over

ALLOWED: Mapping[str, Sequence[str]] = {
    READINESS_USER: ("attest",),
    WATCH_USER: ("stack", "signal"),
    # Daemons of an earlier version, until their units are new.
    "root": ("attest", "stack", "signal"),
}
_LONGEST = 4096
_READ_S = 10.0


class Helper:
    """Does what a user may ask for."""

    def __init__(
        self,
        *,
        run: Runner = run_program,
        processes: Callable[[], Sequence[Process]] = list_processes,
        attest_now: Callable[[], Answer],
        uid: int,
        py_spy: str,
    ) -> None:
        self._run, self._processes, self._attest = run, processes, attest_now
        self._uid, self._py_spy = uid, py_spy

    def answer(self, text: bytes, user: str) -> Answer:
        """Answer one question of a user; raises `FleetError` for what that user may not ask."""
        question: Question = parse(Question, text, what="A question to the helper", strict=True)
        what = question["do"]
        if what not in ALLOWED.get(user, ()):
            raise FleetError(
                "The helper does this for somebody else",
                expected=f"one of {', '.join(ALLOWED.get(user, ())) or 'nothing'} from {user}",
                found=what,
            )
        if what == "attest":
            return self._attest()
        if what == "signal":
            return self._signal(question.get("signal", ""), question.get("invocation", ""))
        return self._stack(question.get("pid", 0))

    def _signal(self, name: str, invocation: str) -> Answer:
        """End the start that is meant. A question that waited must not end the one after it."""
        runs = unit_state(self._run, UNIT)["invocation_id"]
        if not name or runs != invocation:
            raise FleetError(
                "Another start of the engine runs", expected=invocation or "its id", found=runs
            )
        done = self._run(["systemctl", "kill", f"--signal={name}", UNIT], check=False)
        return {"done": done.rc == 0, "said": done.stderr}

    def _stack(self, pid: int) -> Answer:
        """Read the stacks of a process; one that cannot be stopped is read as it runs."""
        if pid not in {each.pid for each in left_over(self._processes(), self._uid)}:
            raise FleetError("Only stacks of the engine are read", found=f"process {pid}")
        said = ""
        for extra in ([], ["--nonblocking"]):
            try:
                answer = self._run(
                    [self._py_spy, "dump", "--pid", str(pid), *extra],
                    timeout=STACK_TIMEOUT_S,
                    check=False,
                )
            except FleetError as error:
                said += f"{error}\n"
                continue
            if answer.rc == 0:
                return {"done": True, "said": answer.stdout}
            said += answer.stdout + answer.stderr
        return {"done": False, "said": said}


def attest_now(places: Places) -> Answer:
    """Attest what runs, thoroughly; say whether it passed, and why not."""
    try:
        policy = read_policy(places.etc / POLICY)
        http = local_http(
            policy["port"],
            address=policy["address"],
            api_key=read_api_key(places.etc / ENVIRONMENT),
        )
        deployments = Deployments(places)
        known = Known(policy["answers"], deployments) if policy["answers"] else None
        found = attest(run_program, http, wanted_by(policy, UNIT, known=known), thorough=True)
        if found["passed"]:
            deployments.note_passed(found["release_id"], found["model_id"])
    except FleetError as error:
        return {"done": False, "said": str(error)}
    failed = [f"{each['name']}: {each['detail']}" for each in found["checks"] if not each["passed"]]
    if failed:
        return {"done": False, "said": f"this start takes no requests: {'; '.join(failed)}"}
    return {"done": True, "said": "a start that nobody attended was attested"}


def name_of_peer(connection: socket.socket) -> str:
    """Return the user who is at the other end of a socket, as the kernel knows it."""
    size = struct.calcsize("3i")
    told = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    uid = struct.unpack("3i", told)[1]
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def serve(connection: socket.socket, helper: Helper) -> None:
    """Answer the one question of a connection."""
    connection.settimeout(_READ_S)
    answer: dict[str, Any]
    try:
        with connection.makefile("rb") as stream:
            text = stream.readline(_LONGEST)
        connection.settimeout(None)
        answer = dict(helper.answer(text, name_of_peer(connection)))
    except (FleetError, TimeoutError) as error:
        sys.stderr.write(f"helper: {error}\n")
        answer = {"done": False, "said": str(error)}
    # Whoever asked may be gone.
    with contextlib.suppress(OSError):
        connection.sendall(json.dumps(answer).encode() + b"\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Answer the question that stands on the socket at the standard input."""
    parser = argparse.ArgumentParser(description="Does what the daemons of a node need root for.")
    parser.add_argument("--user", default="glm", help="user of the engine")
    parser.add_argument("--py-spy", default="/opt/glm-fleet/bin/py-spy")
    options = parser.parse_args(argv)
    places = Places()
    helper = Helper(
        attest_now=lambda: attest_now(places),
        uid=pwd.getpwnam(options.user).pw_uid,
        py_spy=options.py_spy,
    )
    with socket.socket(fileno=sys.stdin.fileno()) as connection:
        serve(connection, helper)
    return 0
