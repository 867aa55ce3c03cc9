# SPDX-License-Identifier: Apache-2.0
"""Asks the hub how large the model is, on the controller: see library/model_size.py."""

from __future__ import annotations

import json
import os
import sys
import urllib.parse
from pathlib import Path
from typing import Any

from ansible.utils.display import Display

sys.path.append(str(Path(__file__).resolve().parents[1] / "plugin_utils"))

from glm_action import ControllerAction
from glm_fleet.core.decode import read
from glm_fleet.core.errors import FleetError
from glm_fleet.core.files import write_atomically
from glm_fleet.model.client import HubClient
from glm_fleet.model.fit import ModelSize, measure
from glm_fleet.model.source import Source, check_endpoint, is_commit

_display = Display()


class ActionModule(ControllerAction):
    """Touches no host. That the hub does not tell is an answer too."""

    def act(self, arguments: dict[str, Any], variables: dict[str, Any]) -> dict[str, Any]:
        """Return {size, unknown}: the size, or {} and why it is not known."""
        _, given = self.validate_argument_spec(
            argument_spec={
                "repository": {"type": "str", "required": True},
                "revision": {"type": "str", "required": True},
                "endpoint": {"type": "str", "required": True},
                "mirrors": {"type": "list", "elements": "str", "default": []},
                "proxy": {"type": "str", "default": "", "no_log": True},
                "token": {"type": "str", "default": "", "no_log": True},
                "token_in_clear_text": {"type": "bool", "default": False, "no_log": False},
                "include": {"type": "list", "elements": "str", "default": []},
                "exclude": {"type": "list", "elements": "str", "default": []},
                "cache": {"type": "path", "required": True},
            }
        )
        source = Source(
            repository=given["repository"],
            revision=given["revision"],
            endpoints=tuple(
                check_endpoint(each) for each in (given["endpoint"], *given["mirrors"])
            ),
            include=tuple(given["include"]),
            exclude=tuple(given["exclude"]),
        )
        cache = Path(given["cache"])
        # A branch may have moved since: the hub is asked which commit it is now.
        known = _known(cache, source, source.revision) if is_commit(source.revision) else None
        if known is not None:
            return {"changed": False, "size": known, "unknown": ""}
        _display.display(f"asking the hub how large {source.repository} is")
        try:
            size = measure(_client(given), source, lambda commit: _known(cache, source, commit))
        except FleetError as error:
            # The fetcher may have another way to the hub, or a token of its own.
            return {"changed": False, "size": {}, "unknown": f"{error.message}: {error.found}"}
        if not self._task.check_mode:
            path = _place(cache, source, size["commit"])
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(size) + "\n")
        return {"changed": False, "size": size, "unknown": ""}


def _client(given: dict[str, Any]) -> HubClient:
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if given["proxy"]:
        for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
            os.environ[name] = given["proxy"]
    return HubClient(given["token"], in_clear_text=given["token_in_clear_text"])


def _place(cache: Path, source: Source, commit: str) -> Path:
    # What a pattern leaves out is not counted.
    chosen = (
        json.dumps([source.include, source.exclude]) if source.include or source.exclude else ""
    )
    name = urllib.parse.quote(f"{source.repository} {chosen}".strip(), safe="")
    return cache / f"{name}@{commit}.json"


def _known(cache: Path, source: Source, commit: str) -> ModelSize | None:
    """Return what was measured of this commit before."""
    try:
        return read(ModelSize, _place(cache, source, commit))
    except (FileNotFoundError, FleetError):
        return None
