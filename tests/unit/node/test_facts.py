# SPDX-License-Identifier: Apache-2.0
"""Facts from a process table, a journal and artifact folders made for the test."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from glm_fleet.artifact.hashes import make_manifest
from glm_fleet.core.errors import FleetError
from glm_fleet.core.runner import RunResult
from glm_fleet.core.systemd import read_units
from glm_fleet.node.artifacts import read_artifacts, read_link, read_staging
from glm_fleet.node.facts import read_node
from glm_fleet.node.gateway import ask_as_client, check_config
from glm_fleet.node.kernel import parse_xids
from glm_fleet.node.processes import read_listeners, unit_of, vllm_processes
from glm_fleet.node.query import ARGUMENTS, Host, NodeQuery
from glm_fleet.node.system import read_disk, read_user

ROOT = Path(__file__).resolve().parents[3]
SHOW = """\
Id=glm-serving.service
LoadState=loaded
ActiveState=active
SubState=running
NRestarts=2
MainPID=41
InvocationID=abc
ActiveEnterTimestamp=Sun 2026-11-22 10:00:00 UTC

Id=nvidia-fabricmanager.service
LoadState=not-found
ActiveState=inactive
"""


def make_process(
    proc: Path, pid: int, name: str, command: str, cgroup: str, inode: str = ""
) -> None:
    folder = proc / str(pid)
    (folder / "fd").mkdir(parents=True)
    (folder / "comm").write_text(name + "\n")
    (folder / "cmdline").write_bytes(command.replace(" ", "\0").encode())
    (folder / "cgroup").write_text(cgroup)
    if inode:
        (folder / "fd" / "3").symlink_to(f"socket:[{inode}]")


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    root = tmp_path / "proc"
    (root / "net").mkdir(parents=True)
    heading = "  sl  local_address rem_address   st ...\n"
    (root / "net" / "tcp").write_text(
        heading
        + "   0: 00000000:1F40 00000000:0000 0A 0:0 0:0 0 0 0 900 1\n"
        + "   1: 00000000:1F90 00000000:0000 01 0:0 0:0 0 0 0 901 1\n"
    )
    (root / "net" / "tcp6").write_text(heading + "   0: 00:1F90 00:0000 0A 0 0 0 0 0 902 1\n")
    (root / "meminfo").write_text("MemTotal:       1000 kB\nMemAvailable:    500 kB\n")
    (root / "uptime").write_text("12.5 40.0\n")
    make_process(
        root,
        41,
        "vllm",
        "/opt/venv/bin/python /opt/venv/bin/vllm serve /srv/model",
        "0::/system.slice/glm-serving.service\n",
        "900",
    )
    make_process(
        root,
        42,
        "VLLM::EngineCor",
        "VLLM::EngineCore",
        "3:cpu:/x\n1:name=systemd:/machine/system.slice/glm-serving.service\n",
    )
    make_process(root, 50, "vim", "vim vllm serve.md", "0::/user.slice/session-1.scope\n")
    return root


def test_listeners_name_process_and_unit(proc: Path) -> None:
    first, second = read_listeners([8000, 8080], proc)
    assert (first["port"], first["pid"], first["name"]) == (8000, 41, "vllm")
    assert first["unit"] == "glm-serving.service"
    assert (second["port"], second["pid"], second["unit"]) == (8080, None, "")
    assert read_listeners([22], proc) == []


def test_unit_of_hybrid_and_missing(proc: Path) -> None:
    assert unit_of(42, proc) == "glm-serving.service"
    assert unit_of(50, proc) == "session-1.scope"
    assert unit_of(9999, proc) == ""


def test_vllm_processes_are_server_and_engine_only(proc: Path) -> None:
    assert [each.pid for each in vllm_processes(proc)] == [41, 42]


def test_units() -> None:
    units = read_units(lambda argv, **_: RunResult(0, SHOW, ""), ["a", "b"])
    serving = units["glm-serving.service"]
    assert (serving["active_state"], serving["n_restarts"], serving["main_pid"]) == (
        "active",
        2,
        41,
    )
    assert units["nvidia-fabricmanager.service"]["n_restarts"] == 0


def test_xids() -> None:
    lines = [
        {"MESSAGE": "usb 1-1: new device", "__REALTIME_TIMESTAMP": "1"},
        {
            "MESSAGE": "NVRM: Xid (PCI:0000:07:00): 79, pid=1, GPU has fallen off the bus.",
            "__REALTIME_TIMESTAMP": "1700000000500000",
        },
        {
            "MESSAGE": "nvidia-nvswitch3: SXid (PCI:0000:c1:00.0): 24007, Non-fatal, Link 44",
            "__REALTIME_TIMESTAMP": "2",
        },
        {"MESSAGE": [78, 86, 82, 77], "Xid": "binary"},
    ]
    first, second = parse_xids("\n".join(json.dumps(line) for line in lines))
    assert (first["kind"], first["code"], first["device"]) == ("Xid", 79, "0000:07:00")
    assert first["time_s"] == 1700000000.5
    assert (second["kind"], second["code"]) == ("SXid", 24007)


def test_disk_of_a_path_that_does_not_exist_yet(tmp_path: Path) -> None:
    disk = read_disk(tmp_path / "a" / "b")
    assert disk["existing"] == str(tmp_path.resolve())
    assert disk["device"] == tmp_path.stat().st_dev
    assert 0 < disk["free_bytes"] <= disk["total_bytes"]


def test_artifacts_staging_and_links(tmp_path: Path) -> None:
    folder = tmp_path / "model" / "tiny-0123456789ab"
    folder.mkdir(parents=True)
    manifest = {
        "kind": "model",
        "id": "tiny-0123456789ab",
        "files": [{"path": "a", "size": 3, "sha256": ""}, {"path": "b", "size": 4, "sha256": ""}],
        "provenance": {"revision": "r1", "other": 1},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    broken = tmp_path / "release" / "x"
    broken.mkdir(parents=True)
    (broken / "manifest.json").write_text("{")
    staged = tmp_path / ".staging" / "model" / "next"
    staged.mkdir(parents=True)
    (staged / "shard").write_bytes(b"x" * 5000)
    errors: list[str] = []
    (found,) = read_artifacts(tmp_path, ["revision", "repository"], errors)
    assert found.pop("damage")[0].startswith("manifest.json damaged")
    assert found == {
        "kind": "model",
        "id": "tiny-0123456789ab",
        "bytes": 7,
        "published_at": (folder / "manifest.json").stat().st_mtime,
        "provenance": {"revision": "r1"},
    }
    assert len(errors) == 1
    assert str(broken) in errors[0]
    assert read_staging(tmp_path / ".staging")["model"] >= 5000
    assert read_staging(tmp_path / "none") == {}
    link = tmp_path / "current"
    link.symlink_to(folder)
    assert read_link(link)["target"] == str(folder)
    assert read_link(tmp_path / "none") == {
        "path": str(tmp_path / "none"),
        "target": None,
        "exists": False,
    }


def test_damage_is_seen_from_sizes(tmp_path: Path) -> None:
    folder = tmp_path / "staging"
    folder.mkdir()
    (folder / "shard").write_bytes(b"1234567")
    manifest = make_manifest(folder, kind="model", slug="tiny", provenance={})
    final = tmp_path / "model" / manifest.id
    final.parent.mkdir()
    folder.rename(final)
    (final / "manifest.json").write_text(json.dumps(manifest.as_dict()))
    assert read_artifacts(tmp_path, [], [])[0]["damage"] == []
    (final / "shard").write_bytes(b"1234")
    assert read_artifacts(tmp_path, [], [])[0]["damage"] == ["shard: truncated (4 of 7 bytes)"]


def test_haproxy_says_itself_whether_its_configuration_is_valid() -> None:
    def run(argv: Sequence[str], **_: Any) -> RunResult:
        assert argv == ["haproxy", "-c", "-q", "-f", "/etc/haproxy/haproxy.cfg"]
        return RunResult(1, "", "[NOTICE] x\n[ALERT]  (1) : config : unknown keyword 'foo'\n")

    assert "unknown keyword" in check_config("/etc/haproxy/haproxy.cfg", run)
    assert check_config("/x", lambda argv, **_: RunResult(0, "", "")) == ""


def test_nobody_behind_the_front_door(tmp_path: Path) -> None:
    answer = ask_as_client("http://127.0.0.1:1", tmp_path / "own.key")
    assert answer["status"] == 0
    assert "refused" in answer["error"]


def test_users() -> None:
    assert read_user("root")["system"] is True
    assert read_user("nobody-of-that-name") == {"exists": False}


def test_one_broken_tool_does_not_hide_the_rest(proc: Path, tmp_path: Path) -> None:
    def run(argv: Sequence[str], **_: Any) -> RunResult:
        if argv[:2] == ["systemctl", "show"]:
            return RunResult(0, SHOW, "")
        raise FleetError(f"{argv[0]} is missing", found="nothing")

    query = NodeQuery(ports=[8000], controller_epoch=100.0, artifact_root=str(tmp_path / "none"))
    facts = read_node(query, Host(run, now=lambda: 107.5, proc=proc, os_release=tmp_path / "no"))
    assert facts["clock"] == {"epoch_s": 107.5, "skew_s": 7.5}
    assert facts["memory_total_bytes"] == 1024000
    assert facts["uptime_s"] == 12.5
    assert facts["unit"]["main_pid"] == 41
    assert facts["listeners"][0]["pid"] == 41
    assert facts["gpu"]["error"] == "nvidia-smi is missing: nothing"
    assert [error.partition(":")[0] for error in facts["errors"]] == ["os", "systemd", "xids"]
    json.dumps(facts)


def test_the_module_documents_what_can_be_asked() -> None:
    text = (ROOT / "library/node_info.py").read_text().split('r"""')[1].split('"""')[0]
    options = yaml.safe_load(text)["options"]
    # What the action plugin keeps to itself.
    assert set(options) - {"deep", "settings"} == set(ARGUMENTS)
    assert set(ARGUMENTS) == {each.name for each in fields(NodeQuery)}
    for name, spec in ARGUMENTS.items():
        told = {key: options[name].get(key) for key in ("type", "elements", "default")}
        assert told == {key: spec.get(key) for key in told}, name
