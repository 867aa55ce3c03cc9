# SPDX-License-Identifier: Apache-2.0
"""The node's part of the logic as the playbooks bring it to a host, which is this machine here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TASK = {"node_library": {"dest": "{{ dest }}"}}
PLAY = [
    {
        "hosts": "localhost",
        "gather_facts": False,
        "tasks": [
            {**TASK, "check_mode": True, "register": "foretold"},
            {**TASK, "register": "first"},
            {**TASK, "register": "second"},
            {"copy": {"dest": "{{ dest }}/glm_fleet/gate.py", "content": "x", "mode": "0644"}},
            {**TASK, "register": "mended"},
            {
                "copy": {
                    "dest": "{{ dest }}/told",
                    "content": "{{ [foretold, first, second, mended] | to_json }}",
                    "mode": "0644",
                }
            },
        ],
    }
]


def test_files_are_sent_only_where_some_differ(tmp_path: Path) -> None:
    play = tmp_path / "play.yml"
    play.write_text(json.dumps(PLAY))
    done = subprocess.run(
        [
            str(Path(sys.executable).with_name("ansible-playbook")),
            *("-e", f"dest={tmp_path}/lib", "-i", "localhost,", "-c", "local"),
            *("-e", f"ansible_python_interpreter={sys.executable}", str(play)),
        ],
        env={**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told: list[dict[str, Any]] = json.loads((tmp_path / "lib/told").read_text())
    foretold, first, second, mended = told
    assert foretold["written"] == first["written"]
    assert {"gate.py", "node/prestart.py", "core/files.py"} < set(first["written"])
    assert (second["changed"], second["written"]) == (False, [])
    assert mended["written"] == ["gate.py"]
    assert "prestart" in (tmp_path / "lib/glm_fleet/gate.py").read_text()
    # A node that has all of it was only asked.
    assert [each["sent"] for each in told] == [False, True, False, True]
