# SPDX-License-Identifier: Apache-2.0
"""The last lines of a run, as Ansible shows them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FULL = "The disk is full. Expected: 5 GB. Found: 1 GB. What to do: free some room."
TASKS: list[dict[str, Any]] = [
    {"copy": {"content": "x", "dest": "{{ folder }}/{{ inventory_hostname }}", "mode": "0600"}},
    {"block": [{"fail": {"msg": "this one is rescued"}}], "rescue": [{"meta": "noop"}]},
    {"fail": {"msg": "this one is ignored"}, "ignore_errors": True},
    {
        "name": "Unpack",
        "fail": {"msg": FULL},
        "when": "inventory_hostname in ('gpu01', 'gpu02')",
    },
    {
        "name": "Look",
        "command": "{{ item }}",
        "loop": ["/bin/true", "/bin/false"],
        "when": "inventory_hostname == 'gpu03'",
    },
    {
        "name": "Hide",
        "fail": {"msg": "a secret"},
        "no_log": True,
        "when": "inventory_hostname == 'gpu04'",
    },
]


def run(folder: Path, *arguments: str) -> list[str]:
    """Return what stands below Ansible's own recap."""
    play = {"hosts": "all", "gather_facts": False, "tasks": TASKS, "vars": {"folder": str(folder)}}
    (folder / "play.yml").write_text(json.dumps([play]))
    done = subprocess.run(
        [
            str(Path(sys.executable).with_name("ansible-playbook")),
            *("-i", "gpu01,gpu02,gpu03,gpu04,gw01,", "-c", "local"),
            *("-e", f"ansible_python_interpreter={sys.executable}"),
            str(folder / "play.yml"),
            *arguments,
        ],
        env={**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert "[WARNING]: Callback" not in done.stdout + done.stderr
    below = done.stdout.partition("PLAY RECAP")[2].splitlines()
    return [line for line in below[1:] if line and " : ok=" not in line]


def test_each_cause_is_told_once_and_nothing_that_was_mended(tmp_path: Path) -> None:
    head, *rest = run(tmp_path)
    assert head.startswith("play.yml took 0:")
    assert head.endswith(
        ": 5 tasks changed something on 5 of 5 hosts, and it stopped: gpu01, gpu02 and 2 others "
        "failed."
    )
    assert rest[0] == "  gpu01 and gpu02: The disk is full. Expected: 5 GB. Found: 1 GB (Unpack)"
    assert rest[1] == "    What to do: free some room"
    assert rest[2] == "  gpu03: non-zero return code (Look)"
    assert rest[4].startswith("  gpu04: ")
    assert len(rest) == 6
    text = "\n".join(rest)
    assert not any(word in text for word in ("rescued", "ignored", "secret"))


def test_a_run_that_went_well_is_one_line(tmp_path: Path) -> None:
    (line,) = run(tmp_path, "--limit", "gw01", "--check")
    assert line.endswith(": 1 task would change something on 1 of 1 hosts.")
    (line,) = run(tmp_path, "--limit", "gw01")
    assert line.endswith(": 1 task changed something on 1 of 1 hosts.")
    (line,) = run(tmp_path, "--limit", "gw01")
    assert line.endswith(": nothing changed.")
