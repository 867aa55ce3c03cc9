# SPDX-License-Identifier: Apache-2.0
"""The real output of two H200 (driver 580) and its variations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from glm_fleet.core.errors import FleetError
from glm_fleet.core.runner import RunResult
from glm_fleet.node.gpu import GpuLink, parse_query, parse_topology, read_gpus

FIXTURES = Path(__file__).parents[1] / "fixtures" / "nvidia-smi"
CASES = Path(__file__).parents[1] / "fixtures/cases"
XML = (FIXTURES / "h200-x2-q.xml").read_text()
TOPOLOGY = (FIXTURES / "h200-x2-topo.txt").read_text()
UUID = "GPU-00000000-0000-0000-0000-00000000000"
QUERY = f"0, {UUID}1, 9.0\n1, {UUID}2, 9.0\n"


class Smi:
    """Answers as nvidia-smi does."""

    def __init__(
        self, xml: str = XML, query: str = QUERY, topology: str = TOPOLOGY, rc: int = 0
    ) -> None:
        self.answers = {"-q": xml, "topo": topology}
        self.query = query
        self.rc = rc

    def __call__(self, argv: Sequence[str], **_: Any) -> RunResult:
        return RunResult(self.rc, self.answers.get(argv[1], self.query), "")


def test_two_real_gpus() -> None:
    report = read_gpus(Smi())
    assert (report.driver_version, report.cuda_version, report.error) == ("580.159.04", "13.0", "")
    assert [gpu.index for gpu in report.gpus] == [0, 1]
    gpu = report.gpus[1]
    assert (gpu.uuid, gpu.name, gpu.compute_capability) == (f"{UUID}2", "NVIDIA H200", "9.0")
    assert (gpu.memory_total_mib, gpu.memory_used_mib) == (143771, 0)
    assert (gpu.mig_current, gpu.mig_pending, gpu.ecc_current) == (
        "Disabled",
        "Disabled",
        "Enabled",
    )
    assert (gpu.volatile_uncorrectable, gpu.aggregate_uncorrectable) == (0, 0)
    assert (gpu.remap_pending, gpu.remap_failure, gpu.recovery_action) == (False, False, None)
    assert gpu.temperature_c == 39
    assert gpu.power_limit_w == 700.0
    assert gpu.throttle_reasons == ()
    assert gpu.processes == ()
    assert report.as_dict()["nvlink"] == {
        "pairs": 1,
        "nvlink_pairs": 1,
        "kinds": {"NV18": 1},
        "pcie_only": [],
    }


def test_faults_show() -> None:
    xml = (
        XML.replace("<current_mig>Disabled", "<current_mig>Enabled", 1)
        .replace("<dram_uncorrectable>0", "<dram_uncorrectable>2", 1)
        .replace("<sram_uncorrectable_parity>0", "<sram_uncorrectable_parity>1", 1)
        .replace("<remapped_row_pending>No", "<remapped_row_pending>Yes", 1)
        .replace("<gpu_recovery_action>None", "<gpu_recovery_action>Reset", 1)
        .replace("<used>0 MiB", "<used>1200 MiB", 1)
        .replace(
            "<processes>",
            "<processes><process_info><pid>77</pid><process_name>python</process_name>"
            "<used_memory>N/A</used_memory></process_info>",
            1,
        )
        .replace(
            "<clocks_event_reason_hw_thermal_slowdown>Not Active",
            "<clocks_event_reason_hw_thermal_slowdown>Active",
            1,
        )
    )
    first, second = read_gpus(Smi(xml)).gpus
    assert first.mig_current == "Enabled"
    assert first.volatile_uncorrectable == 3
    assert first.remap_pending is True
    assert first.recovery_action == "Reset"
    assert first.memory_used_mib == 1200
    assert first.throttle_reasons == ("hw_thermal_slowdown",)
    assert [(each.pid, each.name, each.used_mib) for each in first.processes] == [
        (77, "python", None)
    ]
    assert second.volatile_uncorrectable == 0


def test_older_driver_names_throttle_reasons_and_power_otherwise() -> None:
    xml = (
        XML.replace("clocks_event_reason", "clocks_throttle_reason")
        .replace("gpu_power_readings", "power_readings")
        .replace("average_power_draw", "power_draw")
        .replace("instant_power_draw", "other")
        .replace("_hw_slowdown>Not Active", "_hw_slowdown>Active", 1)
    )
    gpu = read_gpus(Smi(xml)).gpus[0]
    assert gpu.throttle_reasons == ("hw_slowdown",)
    assert gpu.power_draw_w == 83.01


def test_missing_elements_and_na_become_none() -> None:
    report = read_gpus(Smi("<nvidia_smi_log><gpu id='0'><uuid>N/A</uuid></gpu></nvidia_smi_log>"))
    gpu = report.gpus[0]
    assert (report.driver_version, gpu.index, gpu.uuid) == (None, 0, "")
    assert gpu.memory_total_mib is gpu.compute_capability is gpu.remap_pending is None
    assert gpu.volatile_uncorrectable is None


def test_lost_gpu_is_not_there_and_the_complaint_is_kept() -> None:
    one = XML[: XML.index('<gpu id="00000000:00:07.0">')] + "</nvidia_smi_log>"
    report = read_gpus(Smi(one, rc=15))
    assert len(report.gpus) == 1
    assert "ended with 15" in report.error


@pytest.mark.parametrize(
    ("stdout", "rc", "words"),
    [
        ("NVIDIA-SMI has failed because it couldn't communicate", 9, "ended with 9: NVIDIA-SMI"),
        ("", 0, "gave no XML"),
        ("<nvidia_smi_log><gpu>", 0, "damaged XML"),
    ],
)
def test_broken_driver_is_an_error_field(stdout: str, rc: int, words: str) -> None:
    report = read_gpus(Smi(stdout, rc=rc))
    assert report.gpus == ()
    assert words in report.error


def test_missing_program_is_an_error_field() -> None:
    def run(argv: Sequence[str], **_: Any) -> RunResult:
        raise FleetError("The program nvidia-smi is missing", found="no such file")

    assert read_gpus(run).error == "The program nvidia-smi is missing: no such file"


def test_query_skips_heading_and_noise() -> None:
    text = "index, uuid, compute_cap\n3, GPU-a, 8.0\n4, GPU-b, [N/A]\nUnable to determine\n"
    assert parse_query(text) == {"GPU-a": (3, "8.0"), "GPU-b": (4, None)}


def test_topology_with_network_cards_names_pcie_pairs() -> None:
    text = (
        "\tGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\n"
        "GPU0\t X \tNV12\tSYS\tPXB\t0-31\n"
        "GPU1\tNV12\t X \tPIX\tSYS\t0-31\n"
        "GPU2\tSYS\tPIX\t X \tSYS\t0-31\n"
        "NIC0\tPXB\tSYS\tSYS\t X \t\n"
    )
    assert parse_topology(text) == (
        GpuLink(0, 1, "NV12"),
        GpuLink(0, 2, "SYS"),
        GpuLink(1, 2, "PIX"),
    )
    report = read_gpus(Smi(topology=text)).as_dict()
    assert report["nvlink"]["pcie_only"] == ["0-2 SYS", "1-2 PIX"]


@pytest.mark.parametrize(
    "version",
    [
        "<driver_version>610.57.04 [Deprecated; will be removed in CUDA 14.0. Use KMD Version "
        "instead]</driver_version>",
        "<kmd_version>610.57.04</kmd_version>",
        "<driver_version>N/A</driver_version><kmd_version>610.57.04</kmd_version>",
    ],
)
def test_driver_610_writes_its_version_in_other_ways(version: str) -> None:
    text = (CASES / "12-driver-610/nvidia-smi-q-head.txt").read_text()
    assert version.partition(">")[2].partition("<")[0] in text or "N/A" in version
    xml = XML.replace("<driver_version>580.159.04</driver_version>", version).replace(
        "<cuda_version>13.0</cuda_version>", "<cuda_umd_version>13.3</cuda_umd_version>"
    )
    report = read_gpus(Smi(xml))
    assert (report.driver_version, report.cuda_version) == ("610.57.04", "13.3")


def test_messages_around_the_xml_are_no_damage() -> None:
    report = read_gpus(
        Smi(f"WARNING: x\n{XML}\nWARNING: infoROM is corrupted at gpu 0000:47:00.0\n")
    )
    assert report.error == ""
    assert len(report.gpus) == 2
    assert {each.recovery_told for each in report.gpus} == {True}
