# SPDX-License-Identifier: Apache-2.0
"""Templates of roles as Ansible renders them for a real node of the example inventory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def render(
    folder: Path,
    role: str,
    templates: Sequence[str],
    *,
    roles: Sequence[str] = (),
    variables: Mapping[str, Any] | None = None,
) -> Path:
    """Render templates of a role into ``folder`` from its defaults; return the folder.

    ``roles`` are those whose defaults and variables it reads beside those of its own.
    """
    files = [
        ROOT / "roles" / each / part / "main.yml"
        for each in (*roles, role)
        for part in ("defaults", "vars")
    ]
    source = ROOT / "roles" / role
    play = {
        "hosts": "gpu01",
        "connection": "local",
        "gather_facts": False,
        "vars_files": [str(path) for path in files if path.exists()],
        "tasks": [
            {
                "ansible.builtin.template": {
                    "src": f"{source}/templates/{{{{ item }}}}.j2",
                    "dest": f"{folder}/{{{{ item }}}}",
                    "mode": "0644",
                },
                "loop": list(templates),
                # Of the task: what a role computes from other hosts is not there.
                "vars": {
                    "role_path": str(source),
                    "__serving_made_release": {"id": "vllm-0.23.0-pr38476-0123456789ab"},
                    **(variables or {}),
                },
            }
        ],
    }
    (folder / f"{role}.yml").write_text(json.dumps([play]))
    command = [
        str(Path(sys.executable).with_name("ansible-playbook")),
        *("-i", str(ROOT / "inventory/example")),
        *("-e", f"ansible_python_interpreter={sys.executable}"),
        str(folder / f"{role}.yml"),
    ]
    environment = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "HF_TOKEN": ""}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder
