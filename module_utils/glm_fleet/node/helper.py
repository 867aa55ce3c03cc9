# SPDX-License-Identifier: Apache-2.0
"""What the watchdog and the readiness agent, which are not root, may have done by root.

``attest``  attest the start that runs (the readiness agent asks)
``stack``   print the stacks of one process of the engine (the watchdog)
``signal``  send one start of the engine SIGTERM or SIGKILL (the watchdog)

Here is how they ask; `root` answers.
"""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Annotated, Literal, TypedDict

from ..core.decode import Range, Words, parse
from ..core.errors import FleetError

SOCKET = Path("/run/glm-fleet/helper")
READINESS_USER, WATCH_USER = "glm-sentry", "glm-watch"
STACK_TIMEOUT_S = 20.0
# Known answers of a long context, asked of a slow engine.
_ATTEST_TIMEOUT_S = 3600.0


class _Optional(TypedDict, total=False):
    pid: Annotated[int, Range(2, 2**22)]
    signal: Literal["SIGTERM", "SIGKILL"]
    invocation: Words


class Question(_Optional):
    """What a daemon asks for.

    ``pid`` goes with ``stack``. ``signal`` goes with the question of that name, and so does
    ``invocation``, the start that is meant.
    """

    do: Literal["attest", "stack", "signal"]


class Answer(TypedDict):
    """Whether it was done, or passed, and what is to be said of it."""

    done: bool
    said: Words


def ask(question: Question, path: Path = SOCKET) -> Answer:
    """Have root do something; raises `FleetError` where nobody answers."""
    limit = _ATTEST_TIMEOUT_S if question["do"] == "attest" else 3 * STACK_TIMEOUT_S
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(limit)
        try:
            connection.connect(str(path))
            connection.sendall(json.dumps(question).encode() + b"\n")
            with connection.makefile("rb") as stream:
                line = stream.readline()
        except OSError as error:
            raise FleetError(
                "The helper of this node does not answer",
                expected=f"an answer on {path}",
                found=str(error),
                remedy="start glm-helper.socket, or run site.yml, which installs it",
            ) from error
    return parse(Answer, line, what="The helper's answer")
