# SPDX-License-Identifier: Apache-2.0
"""What the attestation of a node expects, and the key that its server asks for."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, TypedDict

from ..core.decode import Matching, Range, parse
from ..core.errors import FleetError


class Modes(TypedDict, total=False):
    """Modes of CUDA graphs by name: the one that runs, and the one that was wanted."""

    runs: str
    wanted: str


class AnswerLimits(TypedDict):
    """How known answers are judged: see `answers.check_crowd` and `kept_answers.judge`."""

    # By how much a log probability may differ between alone and in a crowd.
    tolerance: Annotated[float, Range(0.0, 100.0)]
    # By how much they may differ on average from before and from other nodes.
    drift: Annotated[float, Range(0.0, 100.0)]
    # Whether the model follows instructions, so that it can be asked for code words.
    needles: bool


class _PolicyOptional(TypedDict, total=False):
    address: str | None
    cuda_graphs: Modes
    answers: AnswerLimits | None


class _Written(_PolicyOptional):
    # A variable that was given on the command line is text.
    port: Annotated[int, Range(1, 65535)] | Annotated[str, Matching("[0-9]{1,5}", "a port")]
    served_model_name: str
    required: Sequence[str]
    forbidden: Sequence[str]


class Policy(TypedDict):
    """What the attestation of a node expects; patterns are those of the journal."""

    address: str
    port: int
    served_model_name: str
    required: Sequence[str]
    forbidden: Sequence[str]
    # {} from a version that did not say.
    cuda_graphs: Modes
    # None where no known answers are asked for, as of a version that had none.
    answers: AnswerLimits | None


def read_api_key(environment_file: Path) -> str:
    """Return the key that clients have to send, '' if there is none.

    Raises `FleetError`, which does not show the file's text, when it cannot be told.
    """
    try:
        text = environment_file.read_text()
    except OSError:
        return ""
    except UnicodeDecodeError:
        raise _no_key(environment_file) from None
    for line in text.splitlines():
        name, _, value = line.partition("=")
        if name == "VLLM_API_KEY":
            try:
                return "".join(shlex.split(value))
            except ValueError:
                raise _no_key(environment_file) from None
    return ""


def _no_key(environment_file: Path) -> FleetError:
    return FleetError(
        "The key of the server cannot be read",
        expected=f"VLLM_API_KEY as a quoted word in {environment_file}",
        found="damaged text",
        remedy="run site.yml, which writes the file anew",
    )


def read_policy(path: Path) -> Policy:
    """Return what the attestation of this node expects; raises `FleetError`."""
    try:
        return parse_policy(path.read_text())
    except (OSError, UnicodeDecodeError, FleetError) as error:
        raise FleetError(
            "This node has no attestation policy",
            expected=f"port, served_model_name, required and forbidden as JSON in {path}",
            found=f"{type(error).__name__}: {error}",
            remedy="run site.yml: the node is not set up to serve",
        ) from error


def parse_policy(text: str) -> Policy:
    """Return what the text of a policy says; raises `FleetError`."""
    written = parse(_Written, text, what="The policy of an attestation")
    try:
        for pattern in (*written["required"], *written["forbidden"]):
            re.compile(pattern)
        return {
            "address": written.get("address") or "127.0.0.1",
            "port": int(written["port"]),
            "served_model_name": written["served_model_name"],
            "required": written["required"],
            "forbidden": written["forbidden"],
            "cuda_graphs": written.get("cuda_graphs") or {},
            "answers": written.get("answers"),
        }
    except (re.error, RecursionError, OverflowError) as error:
        raise FleetError(
            "A pattern of an attestation cannot be read",
            expected="regular expressions in serving_journal_required and _forbidden",
            found=f"{pattern[:80]!a}: {error}",
        ) from error
