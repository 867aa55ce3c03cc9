# SPDX-License-Identifier: Apache-2.0
"""What a host's hardware must be, compared with what it is.

This stays true while a node serves, so preflight and the health check both use it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any

from ..core.causes import why_no_driver
from ..core.errors import FleetError
from ..core.format import parse_version
from ..node.answer import Facts, GpuFacts, GpuFactsReport
from ..node.gpu import HARMFUL_THROTTLING
from ..node.xid import LOOK, NOTHING, PROGRAM, REBOOT, RESET, Fault, faults, same_device

ERROR = "error"
WARNING = "warning"


@dataclass(frozen=True)
class Problem:
    """One thing that is not as it must be, and what to do about it."""

    host: str
    check: str
    expected: str
    found: str
    remedy: str
    severity: str = ERROR

    def as_dict(self) -> dict[str, str]:
        """Return plain data."""
        return dict(vars(self))


@dataclass(frozen=True)
class DiskNeed:
    """Space that the next run takes below ``path``, in bytes.

    Nothing is needed when a published artifact of ``kind`` has all of ``provenance`` (a
    subset, also in nested mappings); bytes that are on their way count as there.
    """

    what: str
    path: str
    bytes: int
    kind: str = ""
    provenance: Mapping[str, Any] | None = None
    built: bool = False


@dataclass(frozen=True)
class Expectations:
    """The ``preflight_*`` variables without their prefix; see the role's argument_specs.

    The fields from ``gpu_count`` on are asked of GPU nodes only. ``ports`` are other ports
    than that of the service, with the unit that may hold each.
    """

    architectures: Sequence[str]
    python_min: str
    systemd_min: int
    clock_skew_s: float
    port: int
    unit: str
    disk: Sequence[DiskNeed]
    ports: Sequence[Mapping[str, Any]] = ()
    commands: Sequence[str] = ()
    ram_bytes: int = 0
    user: str = ""
    gpu_count: int = 0
    gpu_model: str = ""
    compute_capability: str = ""
    gpu_memory_mib: int = 0
    gpu_memory_in_use_mib: int = 0
    driver_min: str = "0"
    nvlink: bool = False
    xid_ignore: Sequence[int] = ()
    artifact_keep: int = 0
    certificate_names: Sequence[str] = ()

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Expectations:
        """Read plain data. Raises `FleetError` for a name that is unknown or missing."""
        known = {each.name for each in fields(cls)}
        required = {each.name for each in fields(cls) if each.default is MISSING}
        if not required <= set(data) <= known:
            raise FleetError(
                "The expectations of preflight are not complete",
                expected=f"{sorted(required)}, and any of {sorted(known - required)}",
                found=str(sorted(data)),
            )
        disk = [DiskNeed(**{**need, "bytes": int(need["bytes"])}) for need in data["disk"]]
        return cls(**{**data, "disk": disk})


def hardware_problems(host: str, facts: Facts, expect: Expectations) -> list[Problem]:
    """Return the problems of GPUs, driver, links, fabric manager and kernel log."""
    report: GpuFactsReport = facts.get("gpu") or {}
    gpus = list(report.get("gpus", ()))
    driver = report.get("driver_version")
    problems = list(_no_driver(host, report))
    if not problems or gpus:
        problems += _count_of_gpus(host, gpus, expect)
        problems += _each_gpu(host, gpus, expect, _BOARD)
        problems += _driver_version(host, driver, expect)
        problems += _each_gpu(host, gpus, expect, _STATE)
        problems += _nvlink(host, report, expect)
        problems += _fabric(host, facts, driver)
    return [*problems, *_xids(host, facts, expect)]


@dataclass(frozen=True)
class _GpuRule:
    """What every GPU must be: ``found`` returns None for one that is right, else what it is."""

    check: str
    expected: Callable[[Expectations], str]
    found: Callable[[GpuFacts, Expectations], str | None]
    remedy: str
    severity: str = ERROR


_BOARD = (
    _GpuRule(
        "GPU model",
        lambda expect: f"like {expect.gpu_model}",
        lambda gpu, expect: None if re.search(expect.gpu_model, gpu["name"]) else gpu["name"],
        "take the node out of gpu_nodes, or set preflight_gpu_model",
    ),
    _GpuRule(
        "compute capability",
        lambda expect: expect.compute_capability,
        lambda gpu, expect: (
            None
            if gpu["compute_capability"] == expect.compute_capability
            else gpu["compute_capability"] or "unknown"
        ),
        "take the node out of gpu_nodes, or set preflight_compute_capability",
    ),
    _GpuRule(
        "GPU memory",
        lambda expect: f"{expect.gpu_memory_mib} MiB or more",
        lambda gpu, expect: (
            None
            if (gpu["memory_total_mib"] or 0) >= expect.gpu_memory_mib
            else f"{gpu['memory_total_mib'] or 'unknown'} MiB"
        ),
        "take the node out of gpu_nodes: the model does not fit",
    ),
)
_STATE = (
    _GpuRule(
        "MIG",
        lambda _: "off",
        lambda gpu, _: _mig(gpu),
        "nvidia-smi -mig 0, then reset the GPU or reboot",
    ),
    _GpuRule(
        "ECC",
        lambda _: "on",
        lambda gpu, _: "off" if gpu["ecc_current"] == "Disabled" else None,
        "nvidia-smi -e 1, then reboot",
    ),
    _GpuRule(
        "ECC errors",
        lambda _: "no uncorrectable error since the driver was loaded",
        lambda gpu, _: _count(gpu["volatile_uncorrectable"], "uncorrectable"),
        "reset the GPU or reboot; if it comes back, have the board replaced",
    ),
    _GpuRule(
        "ECC history",
        lambda _: "no uncorrectable error in the life of the board",
        lambda gpu, _: (
            None
            if gpu["volatile_uncorrectable"]
            else _count(gpu["aggregate_uncorrectable"], "uncorrectable")
        ),
        "watch it: the rows were remapped",
        WARNING,
    ),
    _GpuRule(
        "row remap",
        lambda _: "none pending",
        lambda gpu, _: "pending" if gpu["remap_pending"] else None,
        "reset the GPU or reboot so that the rows are remapped",
    ),
    _GpuRule(
        "row remap",
        lambda _: "no failure",
        lambda gpu, _: "failed" if gpu["remap_failure"] else None,
        "have the board replaced",
    ),
    _GpuRule(
        "recovery",
        lambda _: "no action asked for",
        lambda gpu, _: gpu["recovery_action"],
        "do what the driver asks for, then run again",
    ),
    _GpuRule(
        "throttling",
        lambda _: "no hardware slowdown",
        lambda gpu, _: (
            ", ".join(reason for reason in gpu["throttle_reasons"] if reason in HARMFUL_THROTTLING)
            or None
        ),
        "check cooling and power of the node",
        WARNING,
    ),
)


def _each_gpu(
    host: str, gpus: Sequence[GpuFacts], expect: Expectations, rules: Iterable[_GpuRule]
) -> Iterator[Problem]:
    """Yield one problem for each wrong value, with all GPUs that have it."""
    for rule in rules:
        wrong: dict[str, list[int]] = {}
        for gpu in gpus:
            value = rule.found(gpu, expect)
            if value is not None:
                wrong.setdefault(value, []).append(gpu["index"])
        for value, indexes in wrong.items():
            found = f"{value} on GPU {_ranges(indexes)}"
            expected = rule.expected(expect)
            yield Problem(host, rule.check, expected, found, rule.remedy, rule.severity)


def _no_driver(host: str, report: GpuFactsReport) -> Iterator[Problem]:
    error = report.get("error")
    if not error:
        return
    known = why_no_driver(error)
    yield Problem(
        host,
        "driver",
        "nvidia-smi answers",
        f"{known.cause}: {error}" if known else error,
        known.remedy
        if known
        else "install or repair the NVIDIA driver; see dmesg, and reboot if it names a GPU",
    )


def _count_of_gpus(host: str, gpus: Sequence[GpuFacts], expect: Expectations) -> Iterator[Problem]:
    if len(gpus) != expect.gpu_count:
        yield Problem(
            host,
            "GPU count",
            str(expect.gpu_count),
            f"{len(gpus)} (GPU {_ranges([gpu['index'] for gpu in gpus])})" if gpus else "0",
            "look for a GPU that fell off the bus: dmesg, lspci; power-cycle the node",
        )


def _driver_version(host: str, driver: str | None, expect: Expectations) -> Iterator[Problem]:
    if driver and parse_version(driver) < parse_version(expect.driver_min):
        yield Problem(
            host,
            "driver version",
            f"{expect.driver_min} or newer",
            driver,
            "install a newer driver, or choose a release built for an older CUDA",
        )


def _nvlink(host: str, report: GpuFactsReport, expect: Expectations) -> Iterator[Problem]:
    pcie_only = report.get("nvlink", {}).get("pcie_only", ())
    pairs = report.get("nvlink", {}).get("pairs", 0)
    several = len(report.get("gpus", ())) > 1
    if expect.nvlink and several and (pcie_only or not pairs):
        yield Problem(
            host,
            "NVLink",
            "between all GPUs",
            f"PCIe only: {_shortened(pcie_only)}" if pairs else "no link told",
            "check fabric manager and bridges, or set preflight_nvlink: false for PCIe boards",
        )


def _fabric(host: str, facts: Facts, driver: str | None) -> Iterable[Problem]:
    """Boards with NVSwitch answer CUDA error 802 without a fabric manager like the driver."""
    fabric = facts.get("fabric_manager", {})
    if not fabric.get("nvswitches"):
        return
    if fabric.get("active_state") != "active":
        yield Problem(
            host,
            "fabric manager",
            "active: this board has NVSwitches",
            fabric.get("active_state") or "not installed",
            "install nvidia-fabricmanager of the driver's version and start it",
        )
    elif driver and (version := fabric.get("version")) and version != driver:
        yield Problem(
            host,
            "fabric manager",
            f"version {driver}, as the driver",
            version,
            "install the matching nvidia-fabricmanager and restart it",
        )


# What an operator does about a fault, by what NVIDIA's lists ask for.
_XID_REMEDIES: Mapping[str, str] = {
    REBOOT: "drain the node and reboot it (a reset of the GPU is not enough); if it comes back, "
    "have the board looked at",
    RESET: "drain the node, then reset the GPU (nvidia-smi --gpu-reset -i {device}) or reboot; "
    "if it comes back, have the board replaced",
    LOOK: "have it looked at when the node is next maintained",
    PROGRAM: "nothing for the board: the engine was restarted if it was its program; if it comes "
    "back with every start, report the program",
    NOTHING: "nothing now, the GPU goes on",
}
_SXID_REMEDIES: Mapping[str, str] = {
    REBOOT: "drain the node and reboot it: only that brings the whole fabric back",
    RESET: "drain the node, then reset all its GPUs and switches (stop nvidia-fabricmanager, "
    "nvidia-smi --gpu-reset, start it) or reboot; if it comes back, have the board looked at",
    NOTHING: "nothing: the switch went on by itself",
}


def _xids(host: str, facts: Facts, expect: Expectations) -> Iterable[Problem]:
    gpus = facts.get("gpu", {}).get("gpus", ())
    recovery = {
        gpu["bus_id"]: gpu["recovery_action"] or "None" for gpu in gpus if gpu.get("recovery_told")
    }
    for fault in faults(facts.get("xids", ()), ignore=expect.xid_ignore, recovery=recovery):
        remedies = _SXID_REMEDIES if fault.kind == "SXid" else _XID_REMEDIES
        where = f" on {_devices(fault, gpus)}" if fault.devices else ""
        remedy = remedies[fault.action].format(device=",".join(fault.devices))
        if fault.code == 63 and fault.kind == "Xid":
            remedy = "reset the GPU when the node is next drained: that remaps the row"
        if fault.over:
            remedy = "nothing, unless it comes again: what it asked for was done since"
        harmful = fault.action in (RESET, REBOOT) or (fault.action == LOOK and not fault.meaning)
        yield Problem(
            host,
            fault.name,
            "none in the kernel log",
            f"{fault.count} x{where}: {fault.meaning or 'not in the lists'}; it says: "
            f"{fault.said[:160]}",
            f"{remedy} (look up {fault.name} in NVIDIA's list)",
            ERROR if harmful and not fault.over else WARNING,
        )


def _devices(fault: Fault, gpus: Sequence[GpuFacts]) -> str:
    """Name GPUs by index and PCI address, switches by their address."""
    named = []
    for device in fault.devices:
        index = next(
            (gpu["index"] for gpu in gpus if same_device(gpu.get("bus_id", ""), device.split()[0])),
            None,
        )
        known = "" if index is None or fault.kind == "SXid" else f"GPU {index} "
        named.append(f"{known}({device})" if known else device)
    return ", ".join(named)


def _mig(gpu: GpuFacts) -> str | None:
    if gpu["mig_current"] == "Enabled":
        return "on"
    return "on after the next reset" if gpu["mig_pending"] == "Enabled" else None


def _count(count: int | None, what: str) -> str | None:
    return f"{count} {what}" if count else None


def _shortened(items: Sequence[str]) -> str:
    return ", ".join(items[:4]) + (f" and {len(items) - 4} more" if len(items) > 4 else "")


def _ranges(numbers: Iterable[int]) -> str:
    """Write 0, 1, 2, 5 as ``0-2, 5``."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
