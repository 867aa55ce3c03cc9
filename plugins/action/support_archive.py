# SPDX-License-Identifier: Apache-2.0
"""Packs an archive for whoever helps from afar: see library/support_archive.py."""

from __future__ import annotations

import base64
import io
import sys
import tarfile
import time
import zlib
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "plugin_utils"))

from glm_action import ControllerAction
from glm_fleet import __version__
from glm_fleet.core.format import human_bytes
from glm_fleet.core.table import Line
from glm_fleet.node.support import hider
from glm_terminal import plain, show

# The newest that say how the fleet got where it is.
_MOST_REPORTS = 50


class ActionModule(ControllerAction):
    """Runs on the controller; touches no host."""

    def act(self, arguments: dict[str, Any], variables: dict[str, Any]) -> dict[str, Any]:
        """Write the archive and print what is in it."""
        _, arguments = self.validate_argument_spec(
            argument_spec={
                "hosts": {"type": "list", "elements": "str", "required": True},
                "gathered": {"type": "str", "required": True},
                "reports": {"type": "path", "required": True},
                "dest": {"type": "path", "required": True},
            }
        )
        texts = {"version.txt": f"glm-fleet {__version__}\n"}
        lines = []
        for host in arguments["hosts"]:
            found = plain(variables["hostvars"][host].get(arguments["gathered"]) or {})
            files = found.get("files") or {}
            for name, packed in files.items():
                text = zlib.decompress(base64.b64decode(packed)).decode()
                texts[f"{host}/{name}"] = text
            why = str(found.get("msg") or "it gave no answer")
            texts.setdefault(
                f"{host}/nothing.txt" if not files else f"{host}/units.txt", why + "\n"
            )
            lines.append(Line(f"  {host}: {len(files)} texts" if files else f"  {host}: {why}"))
        reports = _reports(Path(arguments["reports"]))
        texts |= reports
        lines.append(Line(f"  reports: {len(reports)}"))
        stamp = time.strftime("%Y-%m-%dT%H-%M-%SZ", time.gmtime())
        path = Path(arguments["dest"], f"support-{stamp}.tar.gz")
        if not self._task.check_mode:
            _pack(path, texts, f"support-{stamp}")
            lines.insert(0, Line(f"{path}, {human_bytes(path.stat().st_size)}:"))
        lines.append(Line("Keys and passwords were taken out; look through it before you send it."))
        show(lines)
        return {"changed": False, "path": str(path)}


def _reports(folder: Path) -> dict[str, str]:
    """Return the reports and the newest of the history, without secrets."""
    files = sorted(folder.glob("*.json")) + sorted((folder / "history").glob("*.json"))
    hide = hider(())
    return {
        f"reports/{path.relative_to(folder)}": hide(path.read_text(errors="replace"))
        for path in files[-_MOST_REPORTS:]
    }


def _pack(path: Path, texts: dict[str, str], root: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, text in sorted(texts.items()):
            data = text.encode()
            info = tarfile.TarInfo(f"{root}/{name}")
            info.size, info.mtime, info.mode = len(data), int(time.time()), 0o600
            archive.addfile(info, io.BytesIO(data))
    path.chmod(0o600)
