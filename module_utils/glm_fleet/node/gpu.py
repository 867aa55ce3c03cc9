# SPDX-License-Identifier: Apache-2.0
"""The GPUs of a node, as ``nvidia-smi`` tells them.

Three questions are asked: ``-q -x`` for nearly everything, ``--query-gpu`` for the
compute capability (the XML does not have it), ``topo -m`` for the links. A GPU that fell
off the bus is simply not in the answers. Nothing here raises: what could not be read is
None, and what went wrong stands in `GpuReport.error`.
"""

from __future__ import annotations

import csv
import re
import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from ..core.errors import FleetError
from ..core.format import parse_count
from ..core.runner import Runner

_TIMEOUT_S = 60.0
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_XML_END = "</nvidia_smi_log>"
_QUERY_FIELDS = "index,uuid,compute_cap"
# Reasons of a lower clock that no healthy node has; a power limit under load is none of them.
HARMFUL_THROTTLING = ("hw_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown")


@dataclass(frozen=True)
class GpuProcess:
    """A process that holds memory of a GPU; ``used_mib`` is None where the driver hides it."""

    pid: int
    name: str
    used_mib: int | None


@dataclass(frozen=True)
class Gpu:
    """One GPU. Memory in MiB, temperature in degrees Celsius, power in watts.

    ``mig_*`` and ``ecc_*`` are "Enabled", "Disabled" or None. The uncorrectable counts are
    since the last driver load (volatile) and over the life of the board (aggregate).
    ``recovery_action`` is what the driver asks for, None for nothing; ``recovery_told`` whether
    it tells at all. ``throttle_reasons`` are the active ones, such as ``hw_thermal_slowdown``,
    without idle. Clocks of the multiprocessors are in MHz, as they are now and at most.
    """

    index: int
    uuid: str
    serial: str
    bus_id: str
    name: str
    memory_total_mib: int | None
    memory_used_mib: int | None
    compute_capability: str | None
    mig_current: str | None
    mig_pending: str | None
    ecc_current: str | None
    ecc_pending: str | None
    volatile_uncorrectable: int | None
    aggregate_uncorrectable: int | None
    remap_pending: bool | None
    remap_failure: bool | None
    recovery_action: str | None
    recovery_told: bool
    temperature_c: int | None
    power_draw_w: float | None
    power_limit_w: float | None
    throttle_reasons: tuple[str, ...]
    processes: tuple[GpuProcess, ...]
    sm_clock_mhz: int | None = None
    sm_clock_max_mhz: int | None = None


@dataclass(frozen=True)
class GpuLink:
    """How two GPUs reach each other: ``NV12`` (bonded NVLinks), ``PIX``, ``NODE``, ``SYS``..."""

    first: int
    second: int
    kind: str

    @property
    def is_nvlink(self) -> bool:
        """Tell whether the pair talks over NVLink and not over PCIe."""
        return self.kind.startswith("NV")


@dataclass(frozen=True)
class GpuReport:
    """All GPUs of a node; ``error`` is empty when every question was answered."""

    driver_version: str | None = None
    cuda_version: str | None = None
    gpus: tuple[Gpu, ...] = ()
    links: tuple[GpuLink, ...] = ()
    error: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return plain data, with the links summed up beside the pairs.

        ``nvlink`` is {pairs, nvlink_pairs, kinds: {"NV12": 28}, pcie_only: ["0-3 SYS"]}.
        """
        data = asdict(self)
        kinds: dict[str, int] = {}
        for link in self.links:
            kinds[link.kind] = kinds.get(link.kind, 0) + 1
        data["nvlink"] = {
            "pairs": len(self.links),
            "nvlink_pairs": sum(link.is_nvlink for link in self.links),
            "kinds": kinds,
            "pcie_only": [
                f"{link.first}-{link.second} {link.kind}"
                for link in self.links
                if not link.is_nvlink
            ],
        }
        return data


def read_gpus(run: Runner) -> GpuReport:
    """Ask ``nvidia-smi`` and return what it says; a failure becomes `GpuReport.error`.

    The three questions go side by side: each takes a second and more where the driver has to
    wake the GPUs.
    """

    def ask(*arguments: str) -> tuple[str, str]:
        try:
            answer = run(["nvidia-smi", *arguments], timeout=_TIMEOUT_S, check=False)
        except FleetError as error:
            return "", f"{error.message}: {error.found}"
        if answer.rc == 0:
            return answer.stdout, ""
        # Its complaints go to stdout; a lost GPU fails the call but leaves the others in it.
        said = " ".join((answer.stderr.strip() or answer.stdout.strip()).split())[-300:]
        return answer.stdout, f"nvidia-smi {' '.join(arguments)} ended with {answer.rc}: {said}"

    questions = (
        ("-q", "-x"),
        (f"--query-gpu={_QUERY_FIELDS}", "--format=csv,noheader"),
        ("topo", "-m"),
    )
    with ThreadPoolExecutor(len(questions)) as pool:
        answers = list(pool.map(lambda each: ask(*each), questions))
    (xml, query, topology), errors = zip(*answers)
    if "<nvidia_smi_log" not in xml:
        return GpuReport(error=errors[0] or "nvidia-smi -q -x gave no XML")
    capabilities, links = parse_query(query), parse_topology(topology)
    try:
        driver, cuda, gpus = parse_xml(xml, capabilities)
    except (ET.ParseError, ValueError) as error:
        return GpuReport(error=f"nvidia-smi -q -x gave damaged XML: {error}")
    return GpuReport(driver, cuda, gpus, links, "; ".join(each for each in errors if each))


def parse_query(text: str) -> dict[str, tuple[int, str | None]]:
    """Read ``index, uuid, compute_cap`` lines into {uuid: (index, compute capability)}.

    A heading line and lines that are no such triple (error messages) are skipped.
    """
    found: dict[str, tuple[int, str | None]] = {}
    # A line that is no CSV at all is as good as none.
    for line in text.splitlines():
        try:
            row = [cell.strip() for cell in next(csv.reader([line], skipinitialspace=True), [])]
        except csv.Error:
            continue
        index = parse_count(row[0]) if len(row) == 3 else None
        if index is not None:
            # A note may stand beside it.
            known = re.match(r"[0-9]{1,3}\.[0-9]{1,3}(?=\s|$)", row[2])
            found[row[1]] = (index, known.group() if known else None)
    return found


def parse_topology(text: str) -> tuple[GpuLink, ...]:
    """Read the matrix of ``nvidia-smi topo -m`` into one link per pair of GPUs."""
    lines = [_ANSI.sub("", line) for line in text.splitlines()]
    heading = next((line for line in lines if line.startswith("\t") and "GPU" in line), "")
    columns = [cell.strip() for cell in heading.split("\t")]
    links: list[GpuLink] = []
    for line in lines:
        cells = [cell.strip() for cell in line.split("\t")]
        first = _gpu_number(cells[0])
        if first is None:
            continue
        for column, cell in zip(columns[1:], cells[1:]):
            second = _gpu_number(column)
            if second is not None and second > first:
                links.append(GpuLink(first, second, cell))
    return tuple(links)


def parse_xml(
    text: str, capabilities: dict[str, tuple[int, str | None]]
) -> tuple[str | None, str | None, tuple[Gpu, ...]]:
    """Read ``nvidia-smi -q -x`` into (driver version, CUDA version, GPUs).

    Index and compute capability come from ``capabilities`` by UUID; a GPU that is not in
    it is counted by its place. What is printed around the XML is left out. From driver 610 on
    the versions have notes beside them and other names. Raises `ET.ParseError` for text that is
    not XML.
    """
    end = text.rfind(_XML_END)
    begin = text.index("<nvidia_smi_log")
    root = ET.fromstring(text[begin : end + len(_XML_END) if end > 0 else None])  # noqa: S314
    gpus = tuple(
        _gpu(element, place, capabilities) for place, element in enumerate(root.findall("gpu"))
    )
    driver = _version(root, "driver_version", "kmd_version")
    return driver, _version(root, "cuda_version", "cuda_umd_version"), gpus


def _gpu(element: ET.Element, place: int, capabilities: dict[str, tuple[int, str | None]]) -> Gpu:
    uuid = _text(element, "uuid") or ""
    index, capability = capabilities.get(uuid, (place, None))
    power = element.find("gpu_power_readings")
    if power is None:
        power = element.find("power_readings")
    return Gpu(
        index=index,
        uuid=uuid,
        serial=_text(element, "serial") or "",
        bus_id=element.get("id") or "",
        name=_text(element, "product_name") or "",
        memory_total_mib=_integer(element, "fb_memory_usage/total"),
        memory_used_mib=_integer(element, "fb_memory_usage/used"),
        compute_capability=capability,
        mig_current=_text(element, "mig_mode/current_mig"),
        mig_pending=_text(element, "mig_mode/pending_mig"),
        ecc_current=_text(element, "ecc_mode/current_ecc"),
        ecc_pending=_text(element, "ecc_mode/pending_ecc"),
        volatile_uncorrectable=_uncorrectable(element.find("ecc_errors/volatile")),
        aggregate_uncorrectable=_uncorrectable(element.find("ecc_errors/aggregate")),
        remap_pending=_flag(element, "remapped_rows/remapped_row_pending"),
        remap_failure=_flag(element, "remapped_rows/remapped_row_failure"),
        recovery_action=_text(element, "gpu_recovery_action"),
        recovery_told=(element.findtext("gpu_recovery_action") or "N/A").strip() != "N/A",
        temperature_c=_integer(element, "temperature/gpu_temp"),
        power_draw_w=_first_number(power, "average_power_draw", "instant_power_draw", "power_draw"),
        power_limit_w=_first_number(power, "current_power_limit", "power_limit"),
        throttle_reasons=_throttle_reasons(element),
        processes=tuple(_processes(element)),
        sm_clock_mhz=_integer(element, "clocks/sm_clock"),
        sm_clock_max_mhz=_integer(element, "max_clocks/sm_clock"),
    )


def _throttle_reasons(gpu: ET.Element) -> tuple[str, ...]:
    """Return the active reasons; older drivers call the element clocks_throttle_reasons."""
    reasons: list[str] = []
    for generation in ("clocks_event_reason", "clocks_throttle_reason"):
        parent = gpu.find(f"{generation}s")
        for child in parent if parent is not None else ():
            name = child.tag[len(generation) + 1 :]
            if (child.text or "").strip() == "Active" and name != "gpu_idle":
                reasons.append(name)
    return tuple(reasons)


def _processes(gpu: ET.Element) -> list[GpuProcess]:
    found = []
    for element in gpu.findall("processes/process_info"):
        pid = _integer(element, "pid")
        if pid is not None:
            name = _text(element, "process_name") or ""
            found.append(GpuProcess(pid, name, _integer(element, "used_memory")))
    return found


def _uncorrectable(counts: ET.Element | None) -> int | None:
    """Add up every uncorrectable counter; drivers split SRAM errors by kind or do not."""
    if counts is None:
        return None
    values = [_integer(child, ".") for child in counts if "uncorrectable" in child.tag]
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _text(element: ET.Element, path: str) -> str | None:
    found = element.find(path)
    text = (found.text or "").strip() if found is not None else ""
    return None if text in ("", "N/A", "[N/A]", "None") else text


def _version(root: ET.Element, *paths: str) -> str | None:
    """Return the first version that is there, without what is said about it."""
    for path in paths:
        found = re.match(r"\d+(?:\.\d+)*", _text(root, path) or "")
        if found:
            return found.group()
    return None


def _number(element: ET.Element, path: str) -> float | None:
    text = _text(element, path)
    match = re.match(r"-?[0-9]{1,15}(\.[0-9]{1,15})?", text) if text else None
    return float(match.group()) if match else None


def _integer(element: ET.Element, path: str) -> int | None:
    number = _number(element, path)
    return None if number is None else int(number)


def _first_number(element: ET.Element | None, *paths: str) -> float | None:
    if element is None:
        return None
    numbers = (_number(element, path) for path in paths)
    return next((number for number in numbers if number is not None), None)


def _flag(element: ET.Element, path: str) -> bool | None:
    text = _text(element, path)
    return None if text is None else text.lower() in ("yes", "true", "1")


def _gpu_number(label: str) -> int | None:
    match = re.fullmatch(r"GPU([0-9]{1,4})", label)
    return int(match.group(1)) if match else None
