# SPDX-License-Identifier: Apache-2.0
"""State of the simulated GPUs of a node: what node/nvidia-smi answers from."""

from __future__ import annotations

import json
from typing import Any

from .settings import GPU_STATE, Host, LabError
from .system import write_atomic

DRIVER = "580.159.04"
SM_CLOCK_MHZ = 1410
BUSES = (0x07, 0x0F, 0x47, 0x4E, 0x87, 0x90, 0xB7, 0xBD)


def default_state(node: str) -> dict[str, Any]:
    """Eight healthy A100-SXM4-80GB. Memory in MiB; `slot` is the position in the chassis."""
    serial = sum(node.encode()) % 1000
    return {
        "driver_version": DRIVER,
        "driver_loaded": True,
        "cuda_version": "13.0",
        "gpus": [
            {
                "slot": slot,
                "present": True,
                "name": "NVIDIA A100-SXM4-80GB",
                "architecture": "Ampere",
                "compute_cap": "8.0",
                "memory_mib": 81920,
                "used_mib": 0,
                "uuid": f"GPU-77000000-0000-0000-{serial:04d}-{slot + 1:012d}",
                "bus": f"00000000:{bus:02X}:00.0",
                "mig": False,
                "sm_clock_mhz": SM_CLOCK_MHZ,
                "temperature_c": 31,
                "ecc_uncorrectable": 0,
                "remap_pending": False,
                "remap_failure": False,
            }
            for slot, bus in enumerate(BUSES)
        ],
    }


def read_state(host: Host) -> dict[str, Any]:
    """The state a node answers from; LabError when it is no GPU node or is not set up."""
    path = host.root / GPU_STATE
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LabError(
            f"{host.name} has no simulated GPUs: it is no GPU node, or the lab is down",
            changed=False,
        ) from None
    return state


def write_state(host: Host, state: dict[str, Any]) -> None:
    write_atomic(host.root / GPU_STATE, json.dumps(state, indent=1) + "\n")


def change(
    state: dict[str, Any], changes: dict[str, Any], *, index: int | None = None
) -> dict[str, Any]:
    """A copy of the state with fields of every GPU, or of the one in slot `index`, changed.

    `driver_version` and `driver_loaded` belong to the node, every other key to the GPUs.
    Raises LabError for an index that no slot has.
    """
    new: dict[str, Any] = json.loads(json.dumps(state))
    gpus = [gpu for gpu in new["gpus"] if index is None or gpu["slot"] == index]
    if not gpus:
        raise LabError(f"there is no GPU {index}; the node has 0 to 7", changed=False)
    for key, value in changes.items():
        if key in ("driver_version", "driver_loaded"):
            new[key] = value
        else:
            for gpu in gpus:
                gpu[key] = value
    return new


def summary(state: dict[str, Any]) -> str:
    """One line for the status table, with everything that is not as it should be."""
    present = [gpu for gpu in state["gpus"] if gpu["present"]]
    names = sorted({gpu["name"].removeprefix("NVIDIA ") for gpu in present})
    parts = [f"{len(present)}x {', '.join(names)}" if present else "none"]
    if not state["driver_loaded"]:
        parts.append("driver not loaded")
    elif state["driver_version"] != DRIVER:
        parts.append(f"driver {state['driver_version']}")
    for gpu in present:
        clock, degrees = gpu.get("sm_clock_mhz", SM_CLOCK_MHZ), gpu.get("temperature_c", 31)
        faults = [
            word
            for word, wrong in (
                ("MIG", gpu["mig"]),
                (f"ECC {gpu['ecc_uncorrectable']}", gpu["ecc_uncorrectable"]),
                ("remap pending", gpu["remap_pending"]),
                ("remap failure", gpu["remap_failure"]),
                (f"{gpu['used_mib']} MiB used", gpu["used_mib"]),
                (f"{clock} MHz", clock != SM_CLOCK_MHZ),
                (f"{degrees} °C", degrees > 80),
            )
            if wrong
        ]
        if faults:
            parts.append(f"GPU {gpu['slot']}: {', '.join(faults)}")
    return "; ".join(parts)


def xid_line(state: dict[str, Any], xid: int, index: int) -> str:
    """The kernel's line for an Xid of the GPU in slot `index`."""
    bus = next((gpu["bus"] for gpu in state["gpus"] if gpu["slot"] == index), None)
    if bus is None:
        raise LabError(f"there is no GPU {index}; the node has 0 to 7", changed=False)
    text = {
        48: "DBE (double bit error) ECC Error",
        63: "Row remapping event",
        64: "Row remapping failure",
        74: "NVLink: fatal error detected on link 3",
        79: "GPU has fallen off the bus.",
        94: "Contained memory error",
        95: "Uncontained memory error",
    }.get(xid, "simulated by the lab")
    return f"NVRM: Xid (PCI:{bus[4:-2]}): {xid}, pid='<unknown>', name=<unknown>, {text}"
