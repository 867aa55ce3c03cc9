# SPDX-License-Identifier: Apache-2.0
"""The figures of an acceptance for people, and for reports."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, cast

from ...core.table import Line, render_table
from .answer import GpuTrial
from .judge import Judged, kernel_problem
from .record import FaultEntry, Record


def entries(judged: Judged) -> list[FaultEntry]:
    """Return the faults as plain data."""
    return [cast(FaultEntry, asdict(each)) for each in judged.faults]


def figures(trial: GpuTrial) -> dict[str, Any]:
    """Return the figures of a GPU in one row, for reports; None for what was not measured."""
    load, seen = trial.get("load"), trial.get("sampled", {})
    rows = trial.get("kernels", {}).get("rows", ())
    return {
        "index": trial.get("index"),
        "serial": trial.get("serial", ""),
        "kernels": len(rows),
        "kernels_wrong": sum(bool(kernel_problem(row)) for row in rows),
        "worst": max((row.get("worst", 0.0) for row in rows), default=None),
        "tflops": load["tflops"] if load else None,
        "gbytes_per_second": load["gbytes_per_second"] if load else None,
        "sm_clock_mhz": seen.get("sm_clock_mhz"),
        "temperature_c": seen.get("temperature_c"),
        "all_reduce_gbytes_per_second": trial.get("together", {}).get("bus_gbytes_per_second"),
    }


def render(record: Record, *, node: str, width: int) -> list[Line]:
    """Return the table of a node's GPUs, and below it what is wrong and what to do."""
    heading = ("GPU", "serial", "kernels", "TFLOP/s", "GB/s", "MHz", "°C", "verdict")
    faults, trials = record.get("faults", ()), record.get("gpus", ())
    rows, tones = [], []
    for trial in trials:
        mine = [each["check"] for each in faults if each["gpu"] == trial.get("index")]
        row = figures(trial)
        rows.append(
            [
                str(row["index"]),
                row["serial"] or "-",
                f"{row['kernels'] - row['kernels_wrong']}/{row['kernels']}",
                *(
                    "-" if row[key] is None else f"{row[key]:.0f}"
                    for key in ("tflops", "gbytes_per_second", "sm_clock_mhz", "temperature_c")
                ),
                ", ".join(mine) or "good",
            ]
        )
        tones.append("bad" if mine else "good")
    lines = [
        Line(f"Acceptance of {node}, {record.get('seconds', 0.0):.0f} s"),
        *render_table(heading, rows, width, tones),
    ]
    together = _together(record)
    lines += [Line(together)] if together else []
    lines += [Line(f"note: {each}") for each in record.get("notes", ())]
    for fault in faults:
        lines += [Line(sentence(fault), "bad"), Line(f"    {fault['remedy']}")]
    return lines


def in_brief(record: Record, *, node: str) -> Line:
    """Say in a line that the GPUs of a node passed, with the figures of the slowest."""
    rows = [figures(trial) for trial in record.get("gpus", ())]
    found = [
        f"{min(values):.0f} {unit}"
        for key, unit in (("tflops", "TFLOP/s"), ("gbytes_per_second", "GB/s"))
        if (values := [row[key] for row in rows if row[key] is not None])
    ]
    slowest = [f"the slowest does {' and '.join(found)}"] if found else []
    text = ", ".join([f"{len(rows)} GPUs are good", *slowest, *filter(None, [_together(record)])])
    return Line(f"  {node}: acceptance took {record.get('seconds', 0.0):.0f} s: {text}", "good")


def _together(record: Record) -> str:
    summed = [trial["together"] for trial in record.get("gpus", ()) if "together" in trial]
    if not summed:
        return ""
    speed = min(each.get("bus_gbytes_per_second", 0.0) for each in summed)
    delay = max(each.get("microseconds", 0.0) for each in summed)
    return f"all-reduce over {len(summed)}: {speed:.1f} GB/s; of one step {delay:.0f} us"


def sentence(fault: FaultEntry) -> str:
    """Say a fault in one line, without the remedy."""
    return f"{fault['where']}: {fault['check']}: {fault['found']} (expected {fault['expected']})"


def sentences(record: Record, most: int = 6) -> str:
    """Say the faults of an acceptance in one line, those of single boards first."""
    faults = sorted(record.get("faults", ()), key=lambda each: each["of_release"])
    more = f"; and {len(faults) - most} more" if len(faults) > most else ""
    return "; ".join(sentence(each) for each in faults[:most]) + more
