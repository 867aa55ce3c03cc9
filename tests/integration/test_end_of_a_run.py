# SPDX-License-Identifier: Apache-2.0
"""What a run shows, from its first line to its last, as Ansible shows it."""

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
    {"name": "Look first", "command": "/bin/true", "changed_when": False},
    {
        "name": "Write",
        "copy": {"content": "x", "dest": "{{ folder }}/{{ inventory_hostname }}", "mode": "0600"},
    },
    {"name": "Say", "debug": {"msg": "{{ 'it is written' }}"}, "run_once": True},
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


def show(folder: Path, *arguments: str) -> list[str]:
    """Return all that a run shows."""
    play = {
        "name": "Write and look",
        "hosts": "all",
        "gather_facts": False,
        "tasks": TASKS,
        "vars": {"folder": str(folder)},
    }
    nobody = {"name": "Nobody", "hosts": "!all", "gather_facts": False, "tasks": TASKS}
    (folder / "play.yml").write_text(json.dumps([nobody, play]))
    done = subprocess.run(
        [
            str(Path(sys.executable).with_name("ansible-playbook")),
            *("-i", "gpu01,gpu02,gpu03,gpu04,gw01,", "-c", "local"),
            *("-e", f"ansible_python_interpreter={sys.executable}"),
            str(folder / "play.yml"),
            *arguments,
        ],
        env={
            **os.environ,
            "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
            "ANSIBLE_NOCOLOR": "1",
            "COLUMNS": "200",
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert "[WARNING]: Callback" not in done.stdout + done.stderr
    return done.stdout.splitlines()


def course(shown: list[str]) -> list[str]:
    """Return what is shown before Ansible's recap, without what only a busy machine adds."""
    before = shown[: next(place for place, line in enumerate(shown) if "PLAY RECAP" in line)]
    return [line for line in before if line and not line.endswith(" ...")]


def run(folder: Path, *arguments: str) -> list[str]:
    """Return what stands below Ansible's own recap."""
    shown = show(folder, *arguments)
    below = shown[next(place for place, line in enumerate(shown) if "PLAY RECAP" in line) :]
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


def test_a_run_shows_phases_changes_and_failures_and_each_once(tmp_path: Path) -> None:
    phase, written, said, *failed = course(show(tmp_path))
    assert phase.strip().endswith("  Write and look")
    assert written == "  changed: Write: gpu01, gpu02, gpu03, gpu04 and gw01"
    assert said == "  it is written"
    unpack = failed.index(next(line for line in failed if "Unpack" in line))
    assert failed[unpack].endswith(": Unpack: The disk is full")
    assert failed[unpack + 1] in ("  as well on gpu01", "  as well on gpu02")
    assert sum("The disk is full" in line for line in failed) == 1
    assert any(line.startswith("  fatal: [gpu03]: Look: non-zero return code") for line in failed)
    assert not any("Look first" in line or "a secret" in line for line in failed)


def test_a_run_that_changes_nothing_shows_its_phases(tmp_path: Path) -> None:
    limit = ("--limit", "gw01")
    show(tmp_path, *limit)
    phase, *others = course(show(tmp_path, *limit))
    assert phase.strip().endswith("  Write and look")
    assert others == [
        "  it is written",
        *(line for line in others if "rescued" in line or "ignored" in line),
    ]


def test_a_difference_is_shown_and_v_shows_every_task(tmp_path: Path) -> None:
    shown = course(show(tmp_path, "--limit", "gw01", "--check", "--diff"))
    place = shown.index("  would change: Write: gw01")
    assert "+x" in shown[place : place + 7]
    verbose = show(tmp_path, "--limit", "gw01", "-v")
    assert "PLAY [Write and look] " in "\n".join(verbose)
    assert any(line.startswith("TASK [Look first]") for line in verbose)
    assert any(line.startswith("changed: [gw01]") for line in verbose)
    assert verbose[-1].startswith("play.yml took")
