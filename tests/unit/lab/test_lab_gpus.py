# SPDX-License-Identifier: Apache-2.0
"""The simulated nvidia-smi answers in the forms of the real one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from lab import gpu, hosts
from lab.settings import LabError

State = dict[str, Any]


@pytest.fixture
def state() -> State:
    return gpu.default_state("gpu01")


def call(tmp_path: Path, state: State, *arguments: str) -> subprocess.CompletedProcess[str]:
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps(state))
    return subprocess.run(
        [sys.executable, hosts.NVIDIA_SMI, *arguments],
        env={**os.environ, "GLM_LAB_GPU_STATE": str(file)},
        capture_output=True,
        text=True,
        check=False,
    )


def query(tmp_path: Path, state: State) -> ElementTree.Element:
    text = call(tmp_path, state, "-q", "-x").stdout
    return ElementTree.fromstring(text)  # noqa: S314 (our own program wrote it)


def test_query_gives_csv_with_and_without_units(tmp_path: Path, state: State) -> None:
    fields = "--query-gpu=index,name,compute_cap,memory.total,pci.bus_id"
    lines = call(tmp_path, state, fields, "--format=csv").stdout.splitlines()
    assert lines[0] == "index, name, compute_cap, memory.total [MiB], pci.bus_id"
    assert lines[1] == "0, NVIDIA A100-SXM4-80GB, 8.0, 81920 MiB, 00000000:07:00.0"
    assert len(lines) == 9
    bare = call(tmp_path, state, fields, "--format=csv,noheader,nounits").stdout.splitlines()
    assert bare[7] == "7, NVIDIA A100-SXM4-80GB, 8.0, 81920, 00000000:BD:00.0"


def test_unknown_field_is_refused(tmp_path: Path, state: State) -> None:
    result = call(tmp_path, state, "--query-gpu=index,flavour", "--format=csv")
    assert result.returncode == 2
    assert result.stdout.startswith('Field "flavour" is not a valid field to query.')


def test_xml_shows_every_fault(tmp_path: Path, state: State) -> None:
    for slot, change in (
        (1, {"ecc_uncorrectable": 2}),
        (2, {"remap_pending": True}),
        (3, {"remap_failure": True}),
        (4, {"mig": True}),
        (5, {"used_mib": 1200}),
    ):
        state = gpu.change(state, change, index=slot)
    gpus = query(tmp_path, state).findall("gpu")
    assert [item.findtext("ecc_errors/volatile/dram_uncorrectable") for item in gpus[:2]] == [
        "0",
        "2",
    ]
    assert gpus[2].findtext("remapped_rows/remapped_row_pending") == "Yes"
    assert gpus[3].findtext("remapped_rows/remapped_row_failure") == "Yes"
    assert gpus[4].findtext("mig_mode/current_mig") == "Enabled"
    assert gpus[5].findtext("fb_memory_usage/used") == "1200 MiB"
    apps = call(tmp_path, state, "--query-compute-apps=pid,used_memory", "--format=csv,noheader")
    assert apps.stdout == "4247, 1200 MiB\n"


def test_a_slow_and_hot_gpu_says_so(tmp_path: Path, state: State) -> None:
    state = gpu.change(state, {"sm_clock_mhz": 345, "temperature_c": 93}, index=3)
    root = query(tmp_path, state)
    healthy, slow = root.findall("gpu")[2:4]
    assert healthy.findtext("clocks/sm_clock") == "1410 MHz"
    assert slow.findtext("clocks/sm_clock") == "345 MHz"
    assert slow.findtext("temperature/gpu_temp") == "93 C"
    reason = "clocks_event_reasons/clocks_event_reason_hw_thermal_slowdown"
    assert (healthy.findtext(reason), slow.findtext(reason)) == ("Not Active", "Active")
    assert gpu.summary(state) == "8x A100-SXM4-80GB; GPU 3: 345 MHz, 93 °C"


def test_lost_gpu_is_gone_and_the_others_are_renumbered(tmp_path: Path, state: State) -> None:
    state = gpu.change(state, {"present": False}, index=3)
    lines = call(tmp_path, state, "-L").stdout.splitlines()
    assert len(lines) == 7
    assert lines[3].startswith("GPU 3: ") and lines[3].endswith("000000000005)")
    root = query(tmp_path, state)
    assert root.findtext("attached_gpus") == "7"
    assert root.findall("gpu")[3].findtext("minor_number") == "4"


def test_topology_is_nvlink(tmp_path: Path, state: State) -> None:
    lines = call(tmp_path, state, "topo", "-m").stdout.splitlines()
    assert lines[1].split("\t")[:3] == ["GPU0", " X ", "NV12"]


def test_broken_driver_ends_with_9(tmp_path: Path, state: State) -> None:
    state = gpu.change(state, {"driver_loaded": False})
    result = call(tmp_path, state)
    assert result.returncode == 9
    assert "couldn't communicate with the NVIDIA driver" in result.stdout


def test_xid_names_the_bus_of_the_gpu(state: State) -> None:
    assert gpu.xid_line(state, 79, 0).startswith("NVRM: Xid (PCI:0000:07:00): 79,")


def test_summary_names_what_is_wrong(state: State) -> None:
    assert gpu.summary(state) == "8x A100-SXM4-80GB"
    state = gpu.change(gpu.change(state, {"present": False}, index=0), {"mig": True}, index=1)
    assert gpu.summary(state) == "7x A100-SXM4-80GB; GPU 1: MIG"


def test_index_out_of_range_is_refused(state: State) -> None:
    with pytest.raises(LabError, match="0 to 7"):
        gpu.change(state, {"mig": True}, index=8)
