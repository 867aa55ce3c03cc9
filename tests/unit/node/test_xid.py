# SPDX-License-Identifier: Apache-2.0
"""Events of GPUs and switches: one event is one, judged by NVIDIA's lists, and over when mended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from glm_fleet.node.xid import (
    LOOK,
    NOTHING,
    PROGRAM,
    REBOOT,
    RESET,
    XIDS,
    Fault,
    faults,
    parse_message,
    same_device,
)

CASES = Path(__file__).parents[1] / "fixtures/cases"
LOADED = "NVRM: loading NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build"


def log(*lines: str) -> list[dict[str, Any]]:
    found = [parse_message(line) for line in lines]
    assert None not in found
    return [each for each in found if each]


def only(*lines: str, **options: Any) -> Fault:
    (fault,) = faults(log(*lines), **options)
    return fault


def case(name: str) -> list[str]:
    return (CASES / name / "kernel.txt").read_text().splitlines()


def sxid(rest: str, code: int = 24007, device: str = "0000:0a:00.0") -> str:
    return f"nvidia-nvswitch3: SXid (PCI:{device}): {code}, {rest}"


def xid(code: int, rest: str, device: str = "0000:47:00") -> str:
    return f"NVRM: Xid (PCI:{device}): {code}, {rest}"


def recovery(before: str, now: str, device: str = "0000:47:00") -> str:
    return xid(154, f"GPU recovery action changed from 0x0 ({before}) to 0x1 ({now})", device)


def test_the_three_lines_of_a_switch_are_one_harmless_event() -> None:
    fault = only(*case("01-sxid-three-lines"))
    assert (fault.name, fault.count, fault.action) == ("SXid 22013", 1, NOTHING)
    assert fault.said.startswith("Non-fatal, Link 44")


@pytest.mark.parametrize("later", ["Non-fatal, Link 44", "Severity 0 Engine instance 44"])
def test_what_was_fatal_once_stays_fatal(later: str) -> None:
    fault = only(sxid("Fatal, Link 44"), sxid("Data {0x1}"), sxid(later), sxid("Data {0x2}"))
    assert fault.action == RESET
    assert fault.said == "Fatal, Link 44"


@pytest.mark.parametrize(
    ("code", "said", "action"),
    [
        (24007, "Fatal, Link 4 sourcetrack timeout error (First)", RESET),
        (20034, "Fatal, Link 30 LTSSM Fault Up", RESET),
        (12028, "Non-fatal, Link 32 egress non-posted PRIV error (First)", NOTHING),
        (23003, "Fatal, Link 12 egress DST-VC credit overflow", REBOOT),
        (22003, "Fatal, Link 8 Minion Halt", REBOOT),
        (11012, "Severity 0 Engine instance 4", NOTHING),
        (11012, "Data {0x0}", NOTHING),
        (11013, "Data {0x0}", RESET),
    ],
)
def test_switch_errors_by_their_own_word_and_the_list(code: int, said: str, action: str) -> None:
    assert only(sxid(said, code)).action == action


def test_every_line_of_real_logs_is_read_and_every_device_named() -> None:
    found = {each.name: each for each in faults(log(*case("06-xid-remedy")))}
    assert list(found) == ["Xid 79", "Xid 154", "Xid 119", "Xid 94", "Xid 63"]
    assert found["Xid 154"].devices == ("0000:07:00", "0000:47:00")
    assert found["Xid 94"].devices == ("0000:08:00", "0000:01:00 GPU-I:05")
    assert [found[name].action for name in found] == [REBOOT, REBOOT, RESET, PROGRAM, NOTHING]
    told = {each.name for each in faults(log(*case("06-xid-remedy")), ignore=())}
    assert told == {*found, "Xid 43", "Xid 13"}


@pytest.mark.parametrize(
    ("code", "action"),
    [
        (8, PROGRAM), (32, PROGRAM), (37, NOTHING), (46, RESET), (48, RESET), (54, LOOK),
        (62, RESET), (64, RESET), (74, RESET), (79, REBOOT), (92, LOOK), (95, RESET),
        (109, RESET), (110, RESET), (120, RESET), (121, NOTHING), (136, RESET), (137, NOTHING),
        (140, RESET), (143, RESET), (156, RESET), (158, RESET), (3, LOOK), (999, LOOK),
    ],
)  # fmt: skip
def test_the_catalogue(code: int, action: str) -> None:
    fault = only(xid(code, "pid=1, name=x, text"))
    assert fault.action == action
    assert bool(fault.meaning) == (code in XIDS)


@pytest.mark.parametrize(
    ("line", "action"),
    [
        (xid(149, "NETIR_LINK_EVT  Fatal   XC0 i0 Link 01 (0x021425c6 0x00000000)"), RESET),
        (xid(145, "RLW_REMAP Nonfatal XC1 i0 Link 00 (0x00000004 0x80000000)"), NOTHING),
        (xid(94, "pid=7194, Contained: SM (0x1). RST: No, D-RST: No"), PROGRAM),
        (xid(94, "pid=7194, Contained: SM (0x1). RST: Yes, D-RST: No"), RESET),
        (recovery("None", "GPU Reset Required"), RESET),
        (recovery("None", "Node Reboot Required"), REBOOT),
        (recovery("None", "Drain and Reset"), RESET),
    ],
)
def test_the_message_has_the_last_word(line: str, action: str) -> None:
    assert only(line).action == action


def test_only_the_drivers_last_word_about_a_gpu_counts() -> None:
    fault = only(
        recovery("None", "Drain and Reset"), recovery("Drain and Reset", "GPU Reset Required")
    )
    assert (fault.count, fault.action) == (1, RESET)
    assert faults(log(recovery("None", "Drain P2P"), recovery("Drain P2P", "None"))) == []


def test_a_reset_ends_what_asked_for_one() -> None:
    timeout = xid(119, "pid=1, Timeout after 6s of waiting for RPC response from GPU4 GSP!")
    assert not only(timeout).over
    asked = recovery("None", "GPU Reset Required")
    over = recovery("GPU Reset Required", "None")
    assert [each.over for each in faults(log(timeout, asked, over))] == [True]
    assert [each.over for each in faults(log(over, timeout))] == [False], "it came again"
    other = over.replace("47:00", "48:00")
    assert [each.over for each in faults(log(timeout, other))] == [False], "another GPU"
    assert only(timeout, LOADED).over, "the driver was loaded anew"
    assert only(timeout, "nvidia 0000:47:00.0: reset done").over
    assert not only(timeout, "nvidia 0000:48:00.0: reset done").over
    assert only(timeout, recovery={"00000000:47:00.0": "None"}).over
    assert not only(timeout, recovery={"00000000:47:00.0": "Reset"}).over
    assert not only(timeout, recovery={"00000000:48:00.0": "None"}).over


def test_only_a_reboot_ends_what_asked_for_one() -> None:
    lost = xid(79, "pid=1, GPU has fallen off the bus.")
    assert not only(lost, LOADED).over
    assert not only(lost, recovery={"00000000:47:00.0": "None"}).over


def test_other_forms_of_the_same_messages() -> None:
    lost = only("NVRM: GPU 0000:29:00.0: GPU has fallen off the bus.")
    assert (lost.code, lost.devices) == (79, ("0000:29:00",))
    assert only("NVRM: Xid (0000:03:00): 48, DBE (double bit error)").devices == ("0000:03:00",)
    assert parse_message("NVRM: GPU at PCI:0000:03:00: GPU-b850f46d-d5ea") is None
    assert parse_message("usb 1-1: new device") is None


def test_addresses_are_the_same_however_they_are_written() -> None:
    assert same_device("0000:9b:00", "00000000:9B:00.0")
    assert same_device("9b:00", "0000:9b:00.0")
    assert not same_device("0000:9b:00", "0001:9b:00")
    assert not same_device("", "")
