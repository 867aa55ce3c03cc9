# SPDX-License-Identifier: Apache-2.0
"""The acceptance of a node: what its GPUs computed and how fast, compared with what they must.

Only plain data comes in and goes out: `run` gathers it. A GPU is compared with the limits of
its board (`BOARDS`), and with the others of the node: boards of one kind compute the same bits at
nearly the same speed, so an odd one is found without any limit.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from statistics import median
from typing import Any

from ...core.errors import FleetError
from ...core.table import plural
from ..gpu import HARMFUL_THROTTLING
from .answer import GpuTrial, KernelRow

NO_NUMBER = 1e9
REPLACE = "drain the node and have this board tested (dcgmi diag -r 3) or replaced"
COOL = "check cooling, air flow and power of the node"
RELEASE = "name a correction in release_patches, another head, or another release_ref"
PROGRAM = "see what the release's Python says there; playbooks/preflight.yml looks at the driver"
LINKS = "look at NVLink, fabric manager and nvidia-smi topo -m; nvidia-smi nvlink --status"


# -- the limits ----------------------------------------------------------------------------
@dataclass(frozen=True)
class Limits:
    """The least that a board must do; 0 asks nothing.

    Bandwidth within the memory and on the bus of an all-reduce in 10^9 bytes a second, products
    of bfloat16 in 10^12 operations a second, the clock under load as a share of its maximum,
    degrees Celsius at most. ``share`` is the least part of the median of the node's GPUs.
    """

    gbytes_per_second: float = 0.0
    tflops: float = 0.0
    clock_share: float = 0.4
    temperature_c: float = 88.0
    all_reduce_gbytes_per_second: float = 0.0
    share: float = 0.85

    def changed(self, values: Mapping[str, Any]) -> Limits:
        """Return them with some replaced. Raises `FleetError` for what is no limit."""
        known = sorted(each.name for each in fields(self))
        try:
            return replace(self, **{str(name): float(value) for name, value in values.items()})
        except (TypeError, ValueError) as error:
            raise FleetError(
                "The limits of the acceptance are not right",
                expected=f"numbers for {', '.join(known)}",
                found=str(error),
                remedy="correct acceptance_limits",
            ) from error


# By the name that the driver gives. About three quarters of what a healthy board does: a lane of
# NVLink, a stack of memory or a clock that is missing takes more than that.
BOARDS: tuple[tuple[str, Limits], ...] = (
    (
        r"A100.*SXM4.*80GB",
        Limits(1500, 190, clock_share=0.5, temperature_c=88, all_reduce_gbytes_per_second=150),
    ),
    (
        r"A100.*(PCIe|PCIE|80GB PCIe)",
        Limits(1350, 140, clock_share=0.4, temperature_c=88, all_reduce_gbytes_per_second=5),
    ),
    (
        r"H100 80GB HBM3",
        Limits(2400, 500, clock_share=0.4, temperature_c=90, all_reduce_gbytes_per_second=200),
    ),
)
# The processor of a lab: it shares its cores with everything else, so no speed means anything.
CPU = Limits(temperature_c=88, share=0.0)


def limits_of(name: str, device: str, changes: Mapping[str, Any]) -> Limits:
    """Return the limits of a board by its name; of an unknown one only those without a figure."""
    found = next((each for pattern, each in BOARDS if re.search(pattern, name)), Limits())
    if device == "cpu":
        found = replace(CPU, clock_share=found.clock_share)
    return found.changed(changes)


# -- the judgement -------------------------------------------------------------------------
@dataclass(frozen=True)
class Fault:
    """One thing that is not as it must be.

    ``gpu`` is the index of the one GPU that has it, None for the node; ``of_release`` says that
    all GPUs have it alike, so that the release is at fault and not a board.
    """

    check: str
    where: str
    expected: str
    found: str
    remedy: str
    gpu: int | None = None
    of_release: bool = False


@dataclass(frozen=True)
class Judged:
    """What came of an acceptance: faults, and notes, which fail nothing."""

    faults: Sequence[Fault] = ()
    notes: Sequence[str] = ()

    @property
    def passed(self) -> bool:
        """Tell whether the node may serve."""
        return not self.faults


@dataclass(frozen=True)
class Board:
    """A GPU's figures with the limits that it is compared with."""

    trial: GpuTrial
    limits: Limits = field(default_factory=Limits)

    @property
    def index(self) -> int:
        """The driver's number of the GPU."""
        return self.trial["index"]

    @property
    def label(self) -> str:
        """Index and serial number, by which people find the board."""
        serial = self.trial.get("serial") or self.trial.get("uuid", "")
        return f"GPU {self.index} (serial {serial})" if serial else f"GPU {self.index}"

    def fault(self, check: str, expected: str, found: str, remedy: str) -> Fault:
        """Return a fault of this GPU."""
        return Fault(check, self.label, expected, found, remedy, self.index)


def judge(
    trials: Sequence[GpuTrial],
    *,
    device: str,
    changes: Mapping[str, Any],
    links: Mapping[str, str],
    dcgm: Sequence[Mapping[str, Any]] = (),
) -> Judged:
    """Judge what was gathered of every GPU of a node.

    ``links`` are kinds of links by pair, {"0-1": "NV12"}; ``dcgm`` the rows of `parse_dcgm`;
    ``changes`` replace limits.
    """
    boards = [Board(each, limits_of(each.get("name", ""), device, changes)) for each in trials]
    faults = [
        *_silent(boards),
        *_kernels(boards, device),
        *_bits(boards),
        *_speeds(boards),
        *_states(boards),
        *_all_reduce(boards),
        *_peers(boards, links),
        *_dcgm(boards, dcgm),
    ]
    return Judged(faults, _notes(boards, device))


def _silent(boards: Sequence[Board]) -> Iterator[Fault]:
    """Trials that ended without an answer: a GPU's fault, or everybody's."""
    for trial in ("kernels", "load", "together"):
        failed = {
            board.index: said
            for board in boards
            if (said := board.trial.get("errors", {}).get(trial))
        }
        if not failed:
            continue
        told = next(iter(failed.values()))
        if trial == "together" or len(failed) == len(boards):
            where = "all GPUs" if len(failed) == len(boards) else _named(boards, failed)
            # The kernels of a release can end the program; torch alone should not.
            remedy = {"kernels": RELEASE, "together": LINKS}.get(trial, PROGRAM)
            yield Fault(
                f"{trial} trial", where, "an answer", told, remedy, of_release=trial == "kernels"
            )
            continue
        for board in boards:
            if board.index in failed:
                yield board.fault(f"{trial} trial", "an answer", failed[board.index], REPLACE)


def _named(boards: Sequence[Board], indexes: Mapping[int, Any]) -> str:
    return ", ".join(board.label for board in boards if board.index in indexes)


def _kernels(boards: Sequence[Board], device: str) -> Iterator[Fault]:
    """Kernels that compute something else: one fault a case where every GPU has it."""
    wrong: dict[str, dict[int, str]] = {}
    for board in boards:
        for row in board.trial.get("kernels", {}).get("rows", ()):
            said = kernel_problem(row)
            if said:
                wrong.setdefault(row["case"], {}).setdefault(board.index, said)
        missing = board.trial.get("kernels", {}).get("missing")
        if missing and device != "cpu":
            wrong.setdefault("none was run", {})[board.index] = f"the environment has no {missing}"
    tried = [board for board in boards if "kernels" in board.trial]
    for case, found in wrong.items():
        check, expected = f"kernel, {case}", "what float32 computes, inside its rows"
        if len(found) == len(tried):
            told = next(iter(found.values()))
            yield Fault(check, "all GPUs", expected, told, RELEASE, of_release=True)
            continue
        for board in tried:
            if board.index in found:
                yield board.fault(check, expected, found[board.index], REPLACE)


def kernel_problem(row: KernelRow) -> str:
    if row.get("error"):
        return row["error"]
    parts = []
    if row.get("outside"):
        parts.append(f"{row['outside']} values written outside the result")
    if row.get("wrong"):
        worst = row.get("worst", 0.0)
        # As `release.proof.cases.compare` writes what is no number, or was never written.
        much = f"by {worst:.3g} at worst" if worst < NO_NUMBER else "some of them no numbers"
        parts.append(f"{row['wrong']} of {row.get('of', 0)} values wrong, {much}")
    return ", ".join(parts)


def _bits(boards: Sequence[Board]) -> Iterator[Fault]:
    """Silent corruption: products that are not the same every time and on every GPU."""
    loaded = [board for board in boards if "load" in board.trial]
    for board in loaded:
        load = board.trial["load"]
        if load["differences"]:
            found = f"{load['differences']} values of the same product differed between runs"
            yield board.fault("repeated product", "the same bits every time", found, REPLACE)
        if load["memory_wrong"]:
            found = f"{load['memory_wrong']} numbers came back as others"
            yield board.fault("memory", "what was written", found, REPLACE)
    for name in dict.fromkeys(board.trial.get("name", "") for board in loaded):
        alike = [board for board in loaded if board.trial.get("name", "") == name]
        counted = Counter(tuple(board.trial["load"]["digests"]) for board in alike)
        (common, count), *others = counted.most_common()
        if not others:
            continue
        for board in alike:
            # Of two that differ nobody can say which is right.
            if tuple(board.trial["load"]["digests"]) != common or 2 * count <= len(alike):
                found = f"another product than {plural(len(alike) - 1, 'other GPU')} of its kind"
                yield board.fault(
                    "product", "the same bits as on every GPU of its kind", found, REPLACE
                )


def _speeds(boards: Sequence[Board]) -> Iterator[Fault]:
    loaded = [board for board in boards if "load" in board.trial]
    for key, check, unit in (
        ("gbytes_per_second", "memory bandwidth", "GB/s"),
        ("tflops", "bf16 products", "TFLOP/s"),
    ):
        figures = {board.index: float(board.trial["load"][key]) for board in loaded}  # type: ignore[literal-required]
        middle = median(figures.values()) if figures else 0.0
        for board in loaded:
            least, value = getattr(board.limits, key), figures[board.index]
            if value < least:
                yield board.fault(check, f"{least:.0f} {unit}", f"{value:.0f} {unit}", COOL)
            elif value < board.limits.share * middle:
                expected = f"{board.limits.share:.0%} of the node's median of {middle:.0f} {unit}"
                yield board.fault(check, expected, f"{value:.0f} {unit}", COOL)


def _states(boards: Sequence[Board]) -> Iterator[Fault]:
    """Clock, temperature and reasons of a lower clock, as the driver told them under load."""
    for board in boards:
        seen, limits = board.trial.get("sampled", {}), board.limits
        clock, most = seen.get("sm_clock_mhz"), seen.get("sm_clock_max_mhz")
        reasons = [each for each in seen.get("throttle_reasons", ()) if each in HARMFUL_THROTTLING]
        because = f", {', '.join(reasons)}" if reasons else ""
        if clock and most and clock < limits.clock_share * most:
            expected = f"{limits.clock_share * most:.0f} MHz of {most} under load"
            yield board.fault("SM clock", expected, f"{clock} MHz{because}", COOL)
        elif reasons:
            yield board.fault("throttling", "no hardware slowdown", ", ".join(reasons), COOL)
        degrees = seen.get("temperature_c")
        if degrees is not None and degrees > limits.temperature_c:
            expected = f"{limits.temperature_c:.0f} °C at most under load"
            yield board.fault("temperature", expected, f"{degrees} °C", COOL)


def _all_reduce(boards: Sequence[Board]) -> Iterator[Fault]:
    summed = [board for board in boards if "together" in board.trial]
    for board in summed:
        if board.trial["together"].get("wrong"):
            found = (
                f"{board.trial['together']['wrong']} of {board.trial['together'].get('of')} sums"
            )
            yield board.fault("all-reduce", "the right sums", f"{found} wrong", LINKS)
    speeds = [
        each
        for board in summed
        if (each := board.trial["together"].get("bus_gbytes_per_second")) is not None
    ]
    least = max((board.limits.all_reduce_gbytes_per_second for board in summed), default=0.0)
    if speeds and min(speeds) < least:
        yield Fault("all-reduce", "all GPUs", f"{least:.0f} GB/s", f"{min(speeds):.1f} GB/s", LINKS)


def _peers(boards: Sequence[Board], links: Mapping[str, str]) -> Iterator[Fault]:
    """Pairs with NVLink between them reach each other's memory."""
    told = [board.trial["together"]["peers"] for board in boards if _has_peers(board)]
    if not told:
        return
    reach = {f"{pair[0]}-{pair[1]}" for pair in told[0] if len(pair) == 2}
    apart = [
        f"{pair} {kind}"
        for pair, kind in links.items()
        if kind.startswith("NV") and pair not in reach
    ]
    if apart:
        shown = ", ".join(apart[:6]) + (f" and {len(apart) - 6} more" if len(apart) > 6 else "")
        expected = "peer access between GPUs that topo -m shows NVLink between"
        yield Fault("peer access", "all GPUs", expected, f"none for {shown}", LINKS)


def _has_peers(board: Board) -> bool:
    return "peers" in board.trial.get("together", {})


def _dcgm(boards: Sequence[Board], rows: Sequence[Mapping[str, Any]]) -> Iterator[Fault]:
    for row in rows:
        if row["status"] != "fail":
            continue
        check, found = f"dcgmi diag, {row['test']}", str(row["said"] or "failed")
        board = next((each for each in boards if each.index == row["gpu"]), None)
        if board:
            yield board.fault(check, "pass", found, REPLACE)
        else:
            yield Fault(check, "the node", "pass", found, "read dcgmi diag, and mend what it names")


def _notes(boards: Sequence[Board], device: str) -> list[str]:
    notes = []
    missing = sorted({board.trial.get("kernels", {}).get("missing", "") for board in boards} - {""})
    answers = [board.trial["kernels"] for board in boards if "kernels" in board.trial]
    if answers and not missing and not any(each.get("rows") for each in answers):
        notes.append("no kernel was run: this release has none of those that are known")
    if missing:
        notes.append(f"the kernels were not run: the environment has no {', '.join(missing)}")
    unknown = sorted({board.trial.get("name", "") for board in boards if not board.limits.tflops})
    if unknown and device != "cpu":
        notes.append(f"no limits of speed are known for {', '.join(unknown)}")
    return notes
