# SPDX-License-Identifier: Apache-2.0
"""The acceptance of a node: figures of real boards judged, and a node accepted once."""

from __future__ import annotations

import json
import os
import pwd
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from glm_fleet.core.errors import FleetError
from glm_fleet.core.runner import RunResult
from glm_fleet.node.acceptance.answer import GpuTrial
from glm_fleet.node.acceptance.dcgm import parse_dcgm
from glm_fleet.node.acceptance.ensure import Wish, ensure, find_environment
from glm_fleet.node.acceptance.judge import Fault, Judged, judge
from glm_fleet.node.acceptance.record import (
    NEVER,
    Record,
    fingerprint,
    kernel_digest,
    look,
    read_acceptance,
    why_needed,
)
from glm_fleet.node.acceptance.run import Settings
from glm_fleet.node.acceptance.table import entries, in_brief, render
from glm_fleet.release.conformance import AT_FULL_SIZE
from glm_fleet.release.installed import COMPLETE

from lab.gpu import default_state

SXM, PCIE = "NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe"
ROOT = Path(__file__).resolve().parents[3]
# As 2 x H100 80GB HBM3 gave them, with the driver 580.159.04, torch 2.11.0 and Triton 3.6.0.
H100 = {"tflops": 691.2, "gbytes_per_second": 3023.2}
H100_SAMPLED = {
    "samples": 7, "sm_clock_mhz": 1635, "sm_clock_max_mhz": 1980, "temperature_c": 59,
    "power_w": 696.7, "throttle_reasons": ["sw_power_cap"],
}  # fmt: skip
CASES = [each["name"] for each in AT_FULL_SIZE["TRITON_MLA_SPARSE"]]
NV12 = {f"{first}-{second}": "NV12" for first in range(8) for second in range(first + 1, 8)}


def gpu(index: int, name: str = SXM, **changes: Any) -> GpuTrial:
    """Return the figures of a healthy board; ``changes`` replace parts, dicts key by key."""
    good: dict[str, Any] = {
        "index": index,
        "uuid": f"GPU-{index}",
        "serial": f"16504210{index:05d}",
        "name": name,
        "errors": {},
        "kernels": {
            "rows": [
                {"case": case, "seed": 0, "outside": 0, "wrong": 0, "of": 5000, "worst": 1.4e-5}
                for case in CASES
            ]
        },
        "load": {
            "begun": 1.0, "ended": 30.0, "digests": ["a", "b"], "differences": 0,
            "tflops": 262.0 - index, "gbytes_per_second": 1740.0 + index,
            "memory_tested_bytes": 70 * 2**30, "memory_wrong": 0,
        },
        "sampled": {
            "samples": 20, "sm_clock_mhz": 1260, "sm_clock_max_mhz": 1410, "temperature_c": 61,
            "power_w": 398.0, "throttle_reasons": ["sw_power_cap"],
        },
        "together": {
            "wrong": 0, "of": 2**24, "bus_gbytes_per_second": 231.0, "microseconds": 41.0
        },
    }  # fmt: skip
    if index == 0:
        good["together"]["peers"] = [[int(each) for each in pair.split("-")] for pair in NV12]
    for key, change in changes.items():
        good[key] = {**good[key], **change} if isinstance(change, dict) else change
    return good  # type: ignore[return-value]


def node(wrong: Mapping[int, GpuTrial] | None = None) -> list[GpuTrial]:
    """Return eight boards, of which some are as given."""
    return [(wrong or {}).get(index) or gpu(index) for index in range(8)]


def judged(trials: Sequence[GpuTrial], **changes: Any) -> Judged:
    given: dict[str, Any] = {"device": "cuda", "changes": {}, "links": NV12, **changes}
    return judge(trials, **given)


def only(found: Judged) -> Fault:
    (fault,) = found.faults
    return fault


def test_a_healthy_node_passes() -> None:
    found = judged(node())
    assert (found.passed, found.notes) == (True, [])


def test_real_figures_of_another_board_pass() -> None:
    trials = [
        gpu(index, "NVIDIA H100 80GB HBM3", load=H100, sampled=H100_SAMPLED,
            together={"bus_gbytes_per_second": 332.0})
        for index in range(2)
    ]  # fmt: skip
    assert judged(trials, links={"0-1": "NV18"}).passed


SICK: dict[str, tuple[dict[str, Any], str, str]] = {
    "slow memory": ({"load": {"gbytes_per_second": 1390.0}}, "memory bandwidth", "1390 GB/s"),
    "slow beside the others": (
        {"load": {"tflops": 205.0}}, "bf16 products", "205 TFLOP/s"
    ),
    "slow clock": (
        {"sampled": {"sm_clock_mhz": 345, "throttle_reasons": ["hw_thermal_slowdown"]}},
        "SM clock",
        "345 MHz, hw_thermal_slowdown",
    ),
    "power brake": (
        {"sampled": {"throttle_reasons": ["hw_power_brake_slowdown", "sw_power_cap"]}},
        "throttling",
        "hw_power_brake_slowdown",
    ),
    "hot": ({"sampled": {"temperature_c": 93}}, "temperature", "93 °C"),
    "other bits": ({"load": {"digests": ["a", "c"]}}, "product", "another product than 7 other"),
    "not the same twice": (
        {"load": {"differences": 3}}, "repeated product", "3 values of the same product differed"
    ),
    "memory that forgets": ({"load": {"memory_wrong": 1}}, "memory", "1 numbers came back"),
    "wrong sums": ({"together": {"wrong": 12}}, "all-reduce", "12 of 16777216 sums wrong"),
    "a trial that died": (
        {"errors": {"load": "CUDA error: uncorrectable ECC error encountered"}},
        "load trial",
        "uncorrectable ECC error",
    ),
    "a kernel that is wrong here alone": (
        {"kernels": {"rows": [
            {"case": CASES[3], "seed": 0, "outside": 0, "wrong": 7, "of": 157610, "worst": 0.25}
        ]}},
        f"kernel, {CASES[3]}",
        "7 of 157610 values wrong, by 0.25 at worst",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SICK)
def test_a_sick_board_is_named_by_index_and_serial(name: str) -> None:
    changes, check, words = SICK[name]
    found = judged(node({3: gpu(3, **changes)}))
    fault = only(found)
    assert (fault.gpu, fault.where) == (3, "GPU 3 (serial 1650421000003)")
    assert fault.check == check
    assert words in fault.found
    assert fault.remedy
    assert not fault.of_release
    assert not found.passed


def test_kernels_that_are_wrong_everywhere_are_told_once_and_are_the_releases() -> None:
    """The figures of the uncorrected pull request on a real GPU."""
    row = {"case": CASES[2], "seed": 0, "outside": 56, "wrong": 1736, "of": 160000, "worst": 1e9}
    fault = only(judged([gpu(each, kernels={"rows": [row]}) for each in range(8)]))
    assert fault.of_release
    assert fault.gpu is None
    assert "56 values written outside the result, 1736 of 160000 values wrong" in fault.found
    assert "release_patches" in fault.remedy


def test_a_trial_that_dies_on_every_gpu_is_told_once() -> None:
    dead = {"errors": {"kernels": "CUDA error: an illegal memory access was encountered"}}
    fault = only(judged([gpu(each, kernels={"rows": []}, **dead) for each in range(8)]))
    assert (fault.where, fault.of_release) == ("all GPUs", True)


def test_of_two_boards_that_differ_both_are_named() -> None:
    trials = [gpu(0), gpu(1, load={"digests": ["a", "z"]})]
    assert [each.gpu for each in judged(trials, links={"0-1": "NV12"}).faults] == [0, 1]


def test_boards_of_other_kinds_need_not_have_the_same_bits() -> None:
    trials = [gpu(0), gpu(1, PCIE, load={"digests": ["x", "y"]})]
    assert judged(trials, links={}).passed


def test_a_slow_bus_and_a_pair_without_peer_access_are_told() -> None:
    trials = [gpu(each, together={"bus_gbytes_per_second": 11.2}) for each in range(8)]
    trials[0]["together"]["peers"] = [[0, 1]]
    slow, apart = judged(trials).faults
    assert (slow.check, slow.found) == ("all-reduce", "11.2 GB/s")
    assert apart.check == "peer access"
    assert apart.found.startswith("none for 0-2 NV12, 0-3 NV12")
    assert "and 21 more" in apart.found
    # Boards on PCIe are measured by another rule, and NVLink is not expected of them.
    pcie = [
        gpu(each, PCIE, load={"tflops": 215.0, "gbytes_per_second": 1640.0},
            sampled={"sm_clock_mhz": 1005}, together={"bus_gbytes_per_second": 11.2})
        for each in range(8)
    ]  # fmt: skip
    pcie[0]["together"]["peers"] = []
    assert judged(pcie, links=dict.fromkeys(NV12, "NODE")).passed


def test_an_unknown_board_is_compared_with_the_others() -> None:
    trials = [gpu(each, "NVIDIA B7", load={"gbytes_per_second": 900.0}) for each in range(8)]
    found = judged(trials)
    assert found.passed
    assert found.notes == ["no limits of speed are known for NVIDIA B7"]
    trials[5] = gpu(5, "NVIDIA B7", load={"gbytes_per_second": 700.0})
    assert only(judged(trials)).where == "GPU 5 (serial 1650421000005)"


def test_limits_are_data() -> None:
    slow = node({3: gpu(3, load={"gbytes_per_second": 1390.0})})
    assert judged(slow, changes={"gbytes_per_second": 1300, "share": 0.7}).passed
    assert len(judged(node(), changes={"tflops": 300}).faults) == 8
    for wrong in ({"tflop": 1}, {"tflops": "fast"}, {"tflops": None}):
        with pytest.raises(FleetError, match="acceptance_limits"):
            judged(node(), changes=wrong)


def test_the_processor_of_a_lab_has_no_speed_but_the_driver_is_believed() -> None:
    trials = [
        gpu(each, load={"tflops": 0.01 * each, "gbytes_per_second": 3.0}, kernels={"rows": [],
            "missing": "Triton"})
        for each in range(8)
    ]  # fmt: skip
    found = judged(trials, device="cpu")
    assert found.passed
    assert found.notes == ["the kernels were not run: the environment has no Triton"]
    trials[2] = gpu(2, sampled={"sm_clock_mhz": 345})
    assert only(judged(trials, device="cpu")).check == "SM clock"
    # On a GPU kernels that are not run prove nothing.
    no_speed = {"tflops": 0, "gbytes_per_second": 0, "share": 0}
    fault = only(judged(trials[:2], changes=no_speed))
    assert (fault.found, fault.of_release) == ("the environment has no Triton", True)


OLD_DCGM = {
    "DCGM GPU Diagnostic": {
        "test_categories": [
            {"category": "Deployment", "tests": [
                {"name": "Denylist", "results": [{"status": "PASS"}]}]},
            {"category": "Hardware", "tests": [
                {"name": "GPU Memory", "results": [
                    {"gpu_ids": "0", "status": "PASS"},
                    {"gpu_ids": "3", "status": "FAIL", "warnings": "page retirement pending"}]}]},
        ]
    }
}  # fmt: skip
NEW_DCGM = {
    "DCGM Diagnostic": {
        "test_categories": [
            {"category": "Hardware", "tests": [
                {"name": "memory", "results": [
                    {"entity_group": "GPU", "entity_id": 3, "status": "Fail",
                     "warnings": [{"warning": "page retirement pending", "error_id": 5}]}],
                 "test_summary": {"status": "Fail"}}]},
        ]
    }
}  # fmt: skip


@pytest.mark.parametrize("answer", [OLD_DCGM, NEW_DCGM])
def test_nvidias_own_diagnosis_names_the_board(answer: Any) -> None:
    rows = [each for each in parse_dcgm(answer) if each["gpu"] is not None]
    fault = next(each for each in judged(node(), dcgm=rows).faults if each.gpu == 3)
    assert fault.check.startswith("dcgmi diag, ")
    assert "page retirement pending" in fault.found
    assert judged(node(), dcgm=parse_dcgm({"results": [{"status": "Skip"}]})).passed


def test_the_table_has_a_row_for_each_gpu_and_says_what_to_do() -> None:
    trials = node({3: gpu(3, sampled={"temperature_c": 93})})
    record: Record = {
        "gpus": trials, "faults": entries(judged(trials)), "seconds": 171.0, "notes": [],
    }  # fmt: skip
    lines = [line.text for line in render(record, node="gpu01", width=120)]
    assert lines[0] == "Acceptance of gpu01, 171 s"
    assert len([line for line in lines if " good" in line]) == 7
    assert "all-reduce over 8: 231.0 GB/s; of one step 41 us" in lines
    (said,) = [line for line in lines if line.startswith("GPU 3 (serial 1650421000003)")]
    assert "temperature: 93 °C" in said
    assert "cooling" in lines[lines.index(said) + 1]


def test_a_node_that_passed_takes_a_line() -> None:
    record: Record = {"gpus": node(), "faults": [], "seconds": 171.0, "notes": []}
    line = in_brief(record, node="gpu01")
    assert line.tone == "good"
    assert line.text.startswith(
        "  gpu01: acceptance took 171 s: 8 GPUs are good, the slowest does "
    )
    assert line.text.endswith("all-reduce over 8: 231.0 GB/s; of one step 41 us")
    assert in_brief({}, node="gpu01").text.endswith("0 GPUs are good")


# -- when a node has to be accepted --------------------------------------------------------
BOARDS = [{"uuid": f"GPU-{index}", "serial": f"s{index}"} for index in range(8)]


def test_a_node_is_accepted_again_when_boards_driver_or_kernels_changed() -> None:
    known = fingerprint(BOARDS, "580.1", "k")
    record: Record = {"passed": True, "fingerprint": known}
    assert why_needed(record, known) == []
    assert why_needed({}, known) == [NEVER]
    assert why_needed({**record, "passed": False}, known) == ["it did not pass"]
    swapped = [*BOARDS[:7], {"uuid": "GPU-new", "serial": "s9"}]
    assert why_needed(record, fingerprint(swapped, "580.1", "k")) == [
        "GPUs are new: s9",
        "GPUs are gone: s7",
    ]
    changed = why_needed(record, fingerprint(BOARDS, "590.2", "l"))
    assert changed == ["the driver was 580.1 and is 590.2", "the release has other kernels"]


def test_the_health_check_sees_whether_the_record_speaks_of_the_node(tmp_path: Path) -> None:
    path = tmp_path / "acceptance.json"
    assert look(BOARDS, "580.1", None, path)["needed"] == [NEVER]
    module = tmp_path / "lib/python3.12/site-packages/vllm/ops.py"
    module.parent.mkdir(parents=True)
    module.write_text("one")
    digest = kernel_digest(tmp_path / "lib/python3.12/site-packages", ["vllm.ops"])
    record = {
        "passed": True, "modules": ["vllm.ops"], "figures": [{"index": 0}],
        "fingerprint": fingerprint(BOARDS, "580.1", digest),
    }  # fmt: skip
    path.write_text(json.dumps(record))
    seen = look(BOARDS, "580.1", tmp_path, path)
    assert (seen["needed"], seen["passed"], seen["figures"]) == ([], True, [{"index": 0}])
    assert look(BOARDS, "580.1", None, path)["needed"] == []
    module.write_text("two")
    assert look(BOARDS, "580.1", tmp_path, path)["needed"] == ["the release has other kernels"]


def test_kernels_are_other_ones_when_their_text_or_compiler_is(tmp_path: Path) -> None:
    module = tmp_path / "vllm/ops.py"
    module.parent.mkdir()
    module.write_text("one")
    (tmp_path / "triton-3.6.0.dist-info").mkdir()
    before = kernel_digest(tmp_path, ["vllm.ops"])
    assert kernel_digest(tmp_path, ["vllm.ops"]) == before
    module.write_text("two")
    other = kernel_digest(tmp_path, ["vllm.ops"])
    (tmp_path / "triton-3.6.0.dist-info").rename(tmp_path / "triton-3.7.0.dist-info")
    assert len({before, other, kernel_digest(tmp_path, ["vllm.ops"])}) == 3


class Node:
    """Answers as the programs of a node do, and keeps what it was asked."""

    def __init__(self, tmp_path: Path) -> None:
        self.state = default_state("gpu01")
        self.unit = "inactive"
        self.asked: list[str] = []
        self.slow = ""
        self._folder = tmp_path

    def __call__(self, argv: Sequence[str], **options: Any) -> RunResult:
        if argv[0] == "nvidia-smi":
            return self._driver(argv)
        if argv[:2] == ["systemctl", "show"]:
            return RunResult(0, f"ActiveState={self.unit}\nId=glm-serving.service\n", "")
        if argv[0] == "systemctl":
            self.asked.append(" ".join(argv))
            self.unit = "inactive"
            return RunResult(0, "", "")
        program = options["input_text"]
        assert argv[-3:] == ["-I", "-B", "-"]
        name = next(each for each in ("kernels", "load", "together")
                    if f'"trial": "{each}"' in program)  # fmt: skip
        self.asked.append(name)
        found = []
        for board in self.state["gpus"]:
            answer: dict[str, Any] = dict(gpu(board["slot"])[name])  # type: ignore[literal-required]
            if name == "load" and self.slow == board["uuid"]:
                answer["gbytes_per_second"] = 400.0
            found.append({"answer": answer})
        return RunResult(0, f"noise\nglm-fleet answers: {json.dumps(found)}\n", "")

    def _driver(self, argv: Sequence[str]) -> RunResult:
        # The driver is asked from several threads at once.
        file = self._folder / f"{threading.get_ident()}.json"
        file.write_text(json.dumps(self.state))
        done = subprocess.run(
            [sys.executable, str(ROOT / "lab/node/nvidia-smi"), *argv[1:]],
            env={**os.environ, "GLM_LAB_GPU_STATE": str(file)},
            capture_output=True,
            text=True,
            check=False,
        )
        return RunResult(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    packages = tmp_path / "packages"
    for case in AT_FULL_SIZE["TRITON_MLA_SPARSE"]:
        file = packages.joinpath(*case["module"].split(".")).with_suffix(".py")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("# kernels")
    me = pwd.getpwuid(os.getuid()).pw_name
    return Settings("/opt/x/bin/python", packages, "vllm-1", me, dcgm_level=0)


def accept_node(settings: Settings, wish: Wish, run: Node, **options: Any) -> dict[str, Any]:
    """Accept a node that has no processes: those of this machine are nobody's business here."""

    def kill(_pid: int, _signal: int) -> None:
        raise AssertionError("nothing may be ended")

    return ensure(settings, wish, run, processes=list, kill=kill, **options)


def test_a_node_is_accepted_once(tmp_path: Path, settings: Settings) -> None:
    run, path, said = Node(tmp_path), tmp_path / "lib/acceptance.json", []
    first = accept_node(settings, Wish(), run, path=path, say=said.append)
    assert (first["ran"], first["passed"], first["needed"]) == (True, True, [NEVER])
    assert run.asked == ["kernels", "load", "together"]
    assert said[0] == "kernels of the release against float32, 8 GPUs"
    kept = read_acceptance(path)
    assert [each["serial"] for each in kept["gpus"]][2:4] == ["1650421000002", "1650421000003"]
    run.asked.clear()
    again = accept_node(settings, Wish(), run, path=path)
    assert (again["ran"], again["passed"], again["needed"], run.asked) == (False, True, [], [])
    assert accept_node(settings, Wish(force=True), run, path=path)["ran"]
    run.state["driver_version"] = "590.1"
    assert accept_node(settings, Wish(only_look=True), run, path=path)["needed"]


def test_a_slow_gpu_fails_the_node_and_is_tried_again(tmp_path: Path, settings: Settings) -> None:
    run, path = Node(tmp_path), tmp_path / "acceptance.json"
    run.slow = run.state["gpus"][5]["uuid"]
    found = accept_node(settings, Wish(), run, path=path)
    assert found["passed"] is False
    assert not found["of_release"]
    assert "GPU 5 (serial 1650421000005): memory bandwidth: 400 GB/s" in found["message"]
    assert "What to do: check cooling" in found["message"]
    # What was started on them since does not change that.
    run.unit = "active"
    known = accept_node(settings, Wish(), run, path=path)
    assert (known["ran"], known["did_not_pass"], known["of_release"]) == (False, True, False)
    assert known["message"] == found["message"]
    run.unit, run.slow = "inactive", ""
    assert accept_node(settings, Wish(), run, path=path)["passed"]


def test_an_engine_that_runs_is_stopped_only_when_that_is_said(
    tmp_path: Path, settings: Settings
) -> None:
    run, path = Node(tmp_path), tmp_path / "acceptance.json"
    run.unit = "active"
    found = accept_node(settings, Wish(), run, path=path)
    assert (found["ran"], found["passed"], run.asked) == (False, None, [])
    assert found["busy"] == "glm-serving.service is active"
    assert accept_node(settings, Wish(stop=True), run, path=path)["passed"]
    assert run.asked[0] == "systemctl stop glm-serving.service"


def test_memory_in_use_on_a_gpu_is_refused(tmp_path: Path, settings: Settings) -> None:
    run = Node(tmp_path)
    run.state["gpus"][1]["used_mib"] = 30000
    with pytest.raises(FleetError, match="An earlier engine still holds"):
        accept_node(settings, Wish(patience_s=0), run, path=tmp_path / "acceptance.json")
    run.state["gpus"] = []
    with pytest.raises(FleetError, match="names no GPU"):
        accept_node(settings, Wish(), run, path=tmp_path / "acceptance.json")


def test_the_environment_is_the_one_that_was_asked_for_or_is_active(tmp_path: Path) -> None:
    with pytest.raises(FleetError, match="no environment of a release"):
        find_environment(tmp_path, "")
    for name in ("one", "two"):
        (tmp_path / "releases" / name).mkdir(parents=True)
        (tmp_path / "releases" / name / COMPLETE).write_text(json.dumps({"release": name}))
    assert find_environment(tmp_path, "one").name == "one"
    (tmp_path / "current").symlink_to(tmp_path / "releases/one")
    assert find_environment(tmp_path, "").name == "one"
    with pytest.raises(FleetError, match="three"):
        find_environment(tmp_path, "three")
