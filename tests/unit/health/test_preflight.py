# SPDX-License-Identifier: Apache-2.0
"""Every check, from a node that is right and one thing that is not."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from glm_fleet.core.errors import FleetError
from glm_fleet.core.format import parse_version as version
from glm_fleet.health.hardware import ERROR, WARNING, Expectations, Problem
from glm_fleet.health.preflight import evaluate, judge_hosts, unreachable
from glm_fleet.health.records import sure_skew
from glm_fleet.node.xid import parse_message

CASES = Path(__file__).parents[1] / "fixtures/cases"
GB = 1_000_000_000
UNIT = "glm-serving.service"
EXPECT: dict[str, Any] = {
    "architectures": ["x86_64"],
    "python_min": "3.10",
    "systemd_min": 247,
    "clock_skew_s": 30.0,
    "port": 8000,
    "unit": UNIT,
    "ports": [{"port": "8002", "unit": "glm-sentry.service"}],
    "user": "glm",
    "commands": ["cc"],
    "ram_bytes": 64 * GB,
    "gpu_count": 8,
    "gpu_model": "A100.*80GB",
    "compute_capability": "8.0",
    "gpu_memory_mib": 80000,
    "gpu_memory_in_use_mib": 500,
    "driver_min": "580",
    "nvlink": True,
    "xid_ignore": [13, 31],
    "disk": [
        {
            "what": "model",
            "path": "/srv/artifacts",
            "bytes": 475 * GB,
            "kind": "model",
            "provenance": {"repository": "a/b", "revision": "r1"},
        },
        {
            "what": "environment",
            "path": "/opt/releases",
            "bytes": 25 * GB,
            "kind": "release",
            "provenance": {},
        },
    ],
}


def make_gpu(index: int) -> dict[str, Any]:
    return {
        "index": index,
        "uuid": f"GPU-{index}",
        "bus_id": "",
        "name": "NVIDIA A100-SXM4-80GB",
        "memory_total_mib": 81920,
        "memory_used_mib": 0,
        "compute_capability": "8.0",
        "mig_current": "Disabled",
        "mig_pending": "Disabled",
        "ecc_current": "Enabled",
        "ecc_pending": "Enabled",
        "volatile_uncorrectable": 0,
        "aggregate_uncorrectable": 0,
        "remap_pending": False,
        "remap_failure": False,
        "recovery_action": None,
        "throttle_reasons": [],
        "processes": [],
    }


def make_facts() -> dict[str, Any]:
    return {
        "os": {"arch": "x86_64"},
        "python": "3.11.2",
        "systemd": 252,
        "commands": {"cc": "/usr/bin/cc"},
        "memory_total_bytes": 1000 * GB,
        "clock": {"skew_s": 0.4},
        "disks": [
            {
                "path": path,
                "mount": "/",
                "device": 1,
                "free_bytes": 600 * GB,
                "total_bytes": 900 * GB,
            }
            for path in ("/srv/artifacts", "/opt/releases")
        ],
        "listeners": [],
        "users": {"glm": {"exists": False}},
        "unit": {"name": UNIT, "active_state": "inactive"},
        "vllm_processes": [],
        "artifacts": [],
        "staging_bytes": {},
        "gpu": {
            "driver_version": "580.159.04",
            "gpus": [make_gpu(index) for index in range(8)],
            "nvlink": {"pairs": 28, "pcie_only": []},
            "error": "",
        },
        "fabric_manager": {"nvswitches": 6, "active_state": "active", "version": "580.159.04"},
        "xids": [],
        "errors": [],
    }


def check(facts: dict[str, Any], *, gpu_node: bool = True) -> list[Problem]:
    return evaluate("gpu01", facts, Expectations.from_dict(EXPECT), gpu_node=gpu_node)


def only(facts: dict[str, Any]) -> Problem:
    problems = check(facts)
    assert len(problems) == 1, problems
    return problems[0]


def test_a_right_node_has_no_problem() -> None:
    assert check(make_facts()) == []


@pytest.mark.parametrize(
    ("path", "value", "name", "found"),
    [
        (("os", "arch"), "aarch64", "architecture", "aarch64"),
        (("python",), "3.9.2", "Python", "3.9.2"),
        (("systemd",), None, "systemd", "none"),
        (("unit",), {}, "systemd", "no answer"),
        (("commands", "cc"), None, "commands", "missing: cc"),
        (("memory_total_bytes",), 32 * GB, "RAM", "32.0 GB"),
        (("clock", "skew_s"), -90.0, "clock", "90 s behind"),
        (("users", "glm"), {"exists": True, "uid": 1001, "system": False}, "user glm", "1001"),
        (("fabric_manager", "active_state"), "failed", "fabric manager", "failed"),
        (("fabric_manager", "version"), "580.1", "fabric manager", "580.1"),
        (("gpu", "nvlink", "pcie_only"), ["0-3 SYS"], "NVLink", "PCIe only: 0-3 SYS"),
        (("gpu", "nvlink", "pairs"), 0, "NVLink", "no link told"),
        (("gpu", "error"), "nvidia-smi ended with 15", "driver", "ended with 15"),
    ],
)
def test_each_fact(path: tuple[str, ...], value: Any, name: str, found: str) -> None:
    facts = make_facts()
    target = facts
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    problem = only(facts)
    assert problem.check == name
    assert found in problem.found
    assert problem.severity == ERROR
    assert problem.expected
    assert problem.remedy


def test_old_driver() -> None:
    facts = make_facts()
    facts["gpu"]["driver_version"] = facts["fabric_manager"]["version"] = "550.54.15"
    assert (only(facts).check, only(facts).found) == ("driver version", "550.54.15")


@pytest.mark.parametrize(
    ("key", "value", "name", "found", "severity"),
    [
        ("name", "NVIDIA H200", "GPU model", "NVIDIA H200 on GPU 2", ERROR),
        ("compute_capability", "9.0", "compute capability", "9.0 on GPU 2", ERROR),
        ("memory_total_mib", 40960, "GPU memory", "40960 MiB on GPU 2", ERROR),
        ("mig_current", "Enabled", "MIG", "on on GPU 2", ERROR),
        ("mig_pending", "Enabled", "MIG", "on after the next reset", ERROR),
        ("ecc_current", "Disabled", "ECC", "off on GPU 2", ERROR),
        ("volatile_uncorrectable", 2, "ECC errors", "2 uncorrectable", ERROR),
        ("aggregate_uncorrectable", 2, "ECC history", "2 uncorrectable", WARNING),
        ("remap_pending", True, "row remap", "pending", ERROR),
        ("remap_failure", True, "row remap", "failed", ERROR),
        ("recovery_action", "Reset", "recovery", "Reset", ERROR),
        ("throttle_reasons", ["hw_slowdown"], "throttling", "hw_slowdown", WARNING),
        ("memory_used_mib", 1200, "GPU memory in use", "1200 MiB on GPU 2", ERROR),
    ],
)
def test_each_gpu_fault(key: str, value: Any, name: str, found: str, severity: str) -> None:
    facts = make_facts()
    facts["gpu"]["gpus"][2][key] = value
    problem = only(facts)
    assert (problem.check, problem.severity) == (name, severity)
    assert found in problem.found


def test_the_same_fault_on_many_gpus_is_one_row() -> None:
    facts = make_facts()
    for index in (0, 1, 2, 5):
        facts["gpu"]["gpus"][index]["name"] = "NVIDIA H200"
    assert only(facts).found == "NVIDIA H200 on GPU 0-2, 5"


def test_a_lost_gpu() -> None:
    facts = make_facts()
    del facts["gpu"]["gpus"][3]
    problem = only(facts)
    assert (problem.check, problem.found) == ("GPU count", "7 (GPU 0-2, 4-7)")


def test_no_driver_is_one_row_and_not_a_row_per_missing_thing() -> None:
    facts = make_facts()
    facts["gpu"] = {"error": "The program nvidia-smi is missing", "gpus": [], "nvlink": {}}
    assert only(facts).check == "driver"


def test_xids_of_programs_are_ignored_and_the_rest_counted() -> None:
    facts = make_facts()
    facts["xids"] = [
        {"kind": "Xid", "code": code, "device": "", "time_s": 0, "message": f"Xid: {code}, x"}
        for code in (13, 79, 79)
    ]
    problem = only(facts)
    assert problem.check == "Xid 79"
    assert problem.found.startswith("2 x")


@pytest.mark.parametrize(("word", "severity"), [("Fatal", ERROR), ("Non-fatal", WARNING)])
def test_switch_faults(word: str, severity: str) -> None:
    facts = make_facts()
    facts["xids"] = [{"kind": "SXid", "code": 24007, "message": f"SXid: 24007, {word}, Link 4"}]
    assert only(facts).severity == severity


def test_a_driver_that_was_updated_under_its_module_wants_a_reboot_and_no_installation() -> None:
    facts = make_facts()
    said = " ".join((CASES / "07-driver-library-mismatch/nvidia-smi.out").read_text().split())
    facts["gpu"] = {"error": f"nvidia-smi -q -x ended with 18: {said}", "gpus": [], "nvlink": {}}
    problem = only(facts)
    assert "the driver was updated while its old kernel module is loaded" in problem.found
    assert problem.remedy.startswith("drain the node and reboot it")
    assert "repair" not in problem.remedy


def kernel_log(*lines: str) -> list[dict[str, Any]]:
    found = [parse_message(line) for line in lines]
    assert None not in found
    return [{**each, "time_s": 0.0} for each in found if each]


def test_each_gpu_of_a_fault_is_named_and_each_fault_has_its_own_remedy() -> None:
    facts = make_facts()
    for gpu, bus in zip(facts["gpu"]["gpus"], ("07", "08", "38", "47")):
        gpu["bus_id"] = f"00000000:{bus}:00.0"
    lines = (CASES / "06-xid-remedy/kernel.txt").read_text().splitlines()
    facts["xids"] = kernel_log(*lines)
    problems = {each.check: each for each in check(facts)}
    changed = problems["Xid 154"]
    assert "GPU 0 (0000:07:00), GPU 3 (0000:47:00)" in changed.found
    assert changed.remedy.startswith("drain the node and reboot it")
    assert (problems["Xid 94"].severity, problems["Xid 63"].severity) == (WARNING, WARNING)
    assert "0000:01:00 GPU-I:05" in problems["Xid 94"].found
    assert "reset the GPU (nvidia-smi --gpu-reset -i 0000:9b:00)" in problems["Xid 119"].remedy
    assert problems["Xid 119"].severity == ERROR
    assert "reset the GPU when the node is next drained" in problems["Xid 63"].remedy


def test_a_gpu_that_was_reset_as_told_is_no_problem_any_more() -> None:
    facts = make_facts()
    gpu = facts["gpu"]["gpus"][2]
    facts["xids"] = kernel_log("NVRM: Xid (PCI:0000:9b:00): 119, pid=1, Timeout after 6s")
    assert only(facts).severity == ERROR
    gpu.update(bus_id="00000000:9B:00.0", recovery_action="Reset", recovery_told=True)
    assert {each.severity for each in check(facts)} == {ERROR}
    gpu["recovery_action"] = None
    assert only(facts).severity == WARNING
    facts["xids"] = kernel_log("NVRM: Xid (PCI:0000:9b:00): 79, pid=1, GPU has fallen off the bus.")
    assert only(facts).severity == ERROR, "only a reboot brings that GPU back"


def test_disk_adds_up_what_shares_a_file_system() -> None:
    facts = make_facts()
    for disk in facts["disks"]:
        disk["free_bytes"] = 480 * GB
    problem = only(facts)
    assert problem.check == "disk /"
    assert problem.expected == "500.0 GB free for model 475.0 GB + environment 25.0 GB"
    assert problem.found == "480.0 GB free of 900.0 GB"
    facts["disks"][1].update(device=2, mount="/opt")
    assert check(facts) == []


def test_disk_does_not_count_what_is_there() -> None:
    facts = make_facts()
    for disk in facts["disks"]:
        disk["free_bytes"] = 30 * GB
    assert only(facts).check == "disk /"
    facts["staging_bytes"] = {"model": 471 * GB}
    assert check(facts) == []
    facts["staging_bytes"] = {}
    provenance = {"repository": "a/b", "revision": "r0"}
    facts["artifacts"] = [{"kind": "model", "id": "m", "bytes": 1, "provenance": provenance}]
    assert only(facts).check == "disk /"
    provenance["revision"] = "r1"
    assert check(facts) == []


def test_disk_counts_what_will_be_retired_before_anything_comes() -> None:
    facts = make_facts()
    for disk in facts["disks"]:
        disk["free_bytes"] = 30 * GB
    facts["protected"] = ["active"]
    facts["artifacts"] = [
        {
            "kind": "model",
            "id": name,
            "bytes": 475 * GB,
            "published_at": age,
            "provenance": {"revision": name},
        }
        for age, name in enumerate(("abandoned", "active"))
    ]
    assert only(facts).found == "30.0 GB free of 900.0 GB"
    expect = Expectations.from_dict({**EXPECT, "artifact_keep": 2})
    assert evaluate("gpu01", facts, expect, gpu_node=True) == []
    # What a roll-back needs stays, and so does everything if nobody can tell what that is.
    facts["protected"] = ["active", "abandoned"]
    assert len(evaluate("gpu01", facts, expect, gpu_node=True)) == 1
    facts["protected"] = None
    assert len(evaluate("gpu01", facts, expect, gpu_node=True)) == 1


def test_disk_names_what_will_go_when_it_is_not_enough() -> None:
    facts = make_facts()
    for disk in facts["disks"]:
        disk["free_bytes"] = 30 * GB
    facts["protected"] = []
    facts["artifacts"] = [
        {"kind": "model", "id": name, "bytes": GB, "published_at": age, "provenance": {}}
        for age, name in enumerate(("old", "new"))
    ]
    expect = Expectations.from_dict({**EXPECT, "artifact_keep": 2})
    (problem,) = evaluate("gpu01", facts, expect, gpu_node=True)
    assert problem.found == "30.0 GB free of 900.0 GB, and 1.0 GB of old artifacts that will go"


def test_release_is_recognised_by_a_part_of_its_provenance() -> None:
    facts = make_facts()
    for disk in facts["disks"]:
        disk["free_bytes"] = 480 * GB
    wanted = {"inputs": {"source": {"ref": "v1"}}}
    disk_needs = [EXPECT["disk"][0], {**EXPECT["disk"][1], "provenance": wanted}]
    expect = Expectations.from_dict({**EXPECT, "disk": disk_needs})
    source = {"ref": "v0", "url": "git://upstream"}
    facts["artifacts"] = [
        {"kind": "release", "id": "r", "bytes": 1, "provenance": {"inputs": {"source": source}}}
    ]
    assert len(evaluate("gpu01", facts, expect, gpu_node=True)) == 1
    source["ref"] = "v1"
    assert evaluate("gpu01", facts, expect, gpu_node=True) == []


def test_port_is_free_or_ours() -> None:
    facts = make_facts()
    owner = {"port": 8000, "pid": 7, "name": "nginx", "user": "www", "unit": UNIT}
    facts["listeners"] = [owner]
    assert check(facts) == []
    owner["unit"] = ""
    assert only(facts).found == "held by nginx (pid 7, user www, no unit)"
    owner["pid"] = None
    assert "cannot be seen" in only(facts).found
    owner.update(port=8002, pid=8, unit=UNIT)
    assert only(facts).expected == "free, or held by glm-sentry.service"
    owner["unit"] = "glm-sentry.service"
    assert check(facts) == []


def test_our_running_service_may_hold_processes_and_memory() -> None:
    facts = make_facts()
    facts["vllm_processes"] = [
        {"pid": 41, "name": "vllm", "user": "glm", "unit": UNIT, "command": "vllm serve"}
    ]
    for gpu in facts["gpu"]["gpus"]:
        gpu["memory_used_mib"] = 70000
        gpu["processes"] = [{"pid": 41, "name": "vllm", "used_mib": 70000, "unit": UNIT}]
    assert {each.check for each in check(facts)} == {"vLLM processes", "GPU memory in use"}
    for state in ("deactivating", "active"):
        facts["unit"]["active_state"] = state
        assert check(facts) == []
    hidden = copy.deepcopy(facts)
    for gpu in hidden["gpu"]["gpus"]:
        gpu["processes"] = []
    assert check(hidden) == []
    facts["gpu"]["gpus"][4]["processes"].append({"pid": 9, "name": "python", "unit": ""})
    assert "pid 9 python" in only(facts).found


def test_memory_of_a_stranger_beside_a_service_that_uses_none() -> None:
    facts = make_facts()
    facts["unit"]["active_state"] = "active"
    facts["gpu"]["gpus"][0]["memory_used_mib"] = 1200
    assert only(facts).found == "1200 MiB on GPU 0 by no process that is listed"


def test_a_gateway_needs_no_gpus() -> None:
    facts = make_facts()
    for key in ("gpu", "fabric_manager", "xids"):
        del facts[key]
    assert check(facts, gpu_node=False) == []
    facts["errors"] = ["units: systemctl failed"]
    assert [each.severity for each in check(facts, gpu_node=False)] == [WARNING]


@pytest.mark.parametrize(
    ("certificate", "words", "severity"),
    [
        ({"error": "there is no such file", "expires_s": 0.0}, "no such file", ERROR),
        ({"error": "", "expires_s": 1e9 - 86400}, "it expired 1 days ago", ERROR),
        ({"error": "", "expires_s": 1e9 + 5 * 86400}, "it expires in 5 days", WARNING),
    ],
)
def test_a_certificate_that_cannot_serve_is_found_before_anything_is_touched(
    certificate: dict[str, Any], words: str, severity: str
) -> None:
    facts = make_facts()
    facts["clock"]["epoch_s"] = 1e9
    facts["certificate"] = {"path": "/etc/x.pem", **certificate}
    assert check(facts) == [], "only a gateway is asked"
    (problem,) = check(facts, gpu_node=False)
    assert (problem.check, problem.severity) == ("certificate", severity)
    assert words in problem.found
    facts["certificate"]["expires_s"], facts["certificate"]["error"] = 2e9, ""
    assert check(facts, gpu_node=False) == []


def test_unreachable_is_a_problem_like_any_other() -> None:
    problem = unreachable("gpu02", "Connection\n refused")
    assert (problem.check, problem.severity) == ("connection", ERROR)
    assert problem.found == "it refuses connections (Connection refused)"
    assert problem.remedy == "start sshd there, or correct ansible_host and ansible_port"
    unknown = unreachable("gpu02", "odd\nwords")
    assert (unknown.found, unknown.remedy) == (
        "odd words",
        "try: ansible -i INVENTORY -b -m ping gpu02",
    )


def test_expectations_refuse_unknown_and_missing_names() -> None:
    with pytest.raises(FleetError, match="not complete"):
        Expectations.from_dict({**EXPECT, "gpu_cuont": 8})
    with pytest.raises(FleetError, match="not complete"):
        Expectations.from_dict({"port": 1})


def test_versions_compare_by_number() -> None:
    assert version("580.159.04") > version("580") > version("550.9")
    assert version("unknown") == ()


@pytest.mark.parametrize(
    ("epoch", "sent", "answered", "off"),
    [
        (1000.0, 940.0, 1001.0, 0.0),  # sixty seconds under way
        (1095.0, 1000.0, 1002.0, 93.0),
        (905.0, 1000.0, 1002.0, -95.0),
    ],
)
def test_the_time_under_way_is_no_fault_of_the_clock(
    epoch: float, sent: float, answered: float, off: float
) -> None:
    clock = {"epoch_s": epoch, "skew_s": epoch - sent}
    assert sure_skew(clock, answered) == off


def test_an_answer_that_cannot_be_used_is_a_problem_of_its_host() -> None:
    expect = [{"gpu_node": True, "expect": EXPECT}]
    records = {
        name: {"message": "", "groups": ["gpu_nodes"], "node": make_facts(), "expect": expect}
        for name in ("gpu01", "gpu02")
    }
    records["gpu02"]["node"]["memory_total_bytes"] = float("inf")

    (problem,) = judge_hosts(records)

    assert (problem.host, problem.check, problem.severity) == ("gpu02", "facts", ERROR)
    assert problem.expected == "memory_total_bytes to be a whole number or null"
    assert problem.found == "inf"
