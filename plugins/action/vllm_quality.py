# SPDX-License-Identifier: Apache-2.0
"""Asks the questions of a set and judges the score: see library/vllm_quality.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ansible.utils.display import Display

sys.path.append(str(Path(__file__).resolve().parents[1] / "plugin_utils"))

from glm_action import FleetAction
from glm_fleet.bench import quality
from glm_fleet.core.decode import decode, read
from glm_fleet.core.errors import FleetError, from_os_error
from glm_fleet.health.tables import write_json
from glm_terminal import plain

# Scores that are kept.
_MOST = 200


class ActionModule(FleetAction):
    """Reads set and record on the controller, and asks on the host."""

    def act(self, arguments: dict[str, Any], variables: dict[str, Any]) -> dict[str, Any]:
        """Return the score beside that of the last other release; raises where it is too low."""
        if self._task.check_mode:
            return {"skipped": True, "msg": "check mode puts no load on a server"}
        host = variables["inventory_hostname"]
        questions = _questions(Path(arguments["set"]), int(arguments.get("most", 200)))
        record = Path(arguments["record"])
        known = _known(record)
        ran = decode(quality.Ran, plain(arguments.get("before") or {}), what="before")
        judged = arguments.get("state", "judged") == "judged"
        if not judged and quality.known_score(ran, quality.name_of(questions), known):
            return {"skipped": True, "msg": f"the score of {ran['release']} is known"}
        Display().display(f"  {host}: {len(questions)} questions")
        result = self.module("vllm_quality", {**arguments, "questions": questions}, variables)
        if result.get("failed"):
            return result
        score = decode(quality.Score, plain(result["score"]), what=f"The score of {host}")
        before = quality.reference(score, known, ran) if judged else None
        found = quality.judge(score, before, float(arguments.get("drop", 0.03)))
        write_json(record, [*known, score][-_MOST:], 0o644)
        beside = ""
        if before:
            beside = (
                f"; {before['release']} gave {found['before']:.1%}, "
                f"{found['lost']} are lost and {found['gained']} gained"
            )
        Display().display(f"  {host}: {found['share']:.1%} right{beside}")
        if not found["passed"]:
            raise FleetError(
                f"{host} gives fewer right answers than before",
                expected=f"{found['before']:.1%}, as {before['release'] if before else ''} gave, "
                f"less {float(arguments.get('drop', 0.03)):.1%} at most",
                found=f"{found['share']:.1%} of {len(questions)} with "
                f"{score['release'] or 'an unknown release'}",
                remedy="do not roll this release out; rollback.yml goes back",
            )
        return {**result, "quality": dict(found)}


def _questions(path: Path, most: int) -> list[quality.Question]:
    try:
        return quality.read_set(path.read_text(), most)
    except (OSError, UnicodeDecodeError) as error:
        raise FleetError(
            "The set of questions cannot be read",
            expected="a file of JSON Lines, named by benchmark_quality_set",
            found=str(error),
        ) from error


def _known(record: Path) -> list[quality.Score]:
    try:
        return list(read(list[quality.Score], record))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise from_os_error(error) from error
