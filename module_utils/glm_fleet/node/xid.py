# SPDX-License-Identifier: Apache-2.0
"""What the GPU driver's messages in the kernel log mean, by NVIDIA's own lists.

Xids: "Analyzing Xid Errors with the Xid Catalog" (docs.nvidia.com, deploy/xid-errors), its
columns for A100 and newer. SXids: appendix D of the Fabric Manager user guide. One event of a
switch is three lines (what happened, its severity, data), so events are judged, not lines; and
a fault is over once the driver, or a driver loaded anew, says that nothing is left to do.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# What a code asks for; a later one in this tuple is the more urgent.
NOTHING, PROGRAM, LOOK, RESET, REBOOT = ACTIONS = (
    "nothing",
    "program",
    "look",
    "reset",
    "reboot",
)

_ENGINE = "an engine of the GPU stopped a program"
XIDS: Mapping[int, tuple[str, str]] = {
    **dict.fromkeys((39, 40, 41, 70, 71, 72, 75, 76, 77, 85), (_ENGINE, PROGRAM)),
    **dict.fromkeys(range(126, 136), (_ENGINE, PROGRAM)),
    **dict.fromkeys((60, 68, 82, 83, 84, 86, 88, 89, 139), (_ENGINE, PROGRAM)),
    **dict.fromkeys(range(96, 106), (_ENGINE, PROGRAM)),
    **dict.fromkeys((11, 25, 32, 69, 80), ("a program sent the GPU wrong commands", PROGRAM)),
    **dict.fromkeys((8, 43), ("a program's work on the GPU was stopped", PROGRAM)),
    13: ("a program made a kernel fail", PROGRAM),
    31: ("a program reached outside its memory", PROGRAM),
    45: ("work was cleaned up after another error", PROGRAM),
    37: ("the driver's firmware met an error and went on", NOTHING),
    38: ("the driver's firmware met an error and went on", NOTHING),
    44: ("a fault while programs took turns, survived", NOTHING),
    46: ("the GPU stopped working", RESET),
    48: ("a memory error that ECC could not correct", RESET),
    54: ("the power cable of the board is not connected", LOOK),
    62: ("a controller inside the GPU halted", RESET),
    63: ("a bad memory row is to be remapped, which the next reset does", NOTHING),
    64: ("a bad memory row could not be remapped", RESET),
    66: ("an access of the driver was refused", NOTHING),
    67: ("an access of the driver was refused", NOTHING),
    74: ("an NVLink failed", RESET),
    78: ("the driver and the firmware do not fit", LOOK),
    79: ("the GPU fell off the bus", REBOOT),
    92: ("many memory errors, all corrected", LOOK),
    93: ("the board's own log is worn", NOTHING),
    94: ("a memory error that hit one program only", PROGRAM),
    95: ("a memory error that was not contained", RESET),
    106: ("a test message", NOTHING),
    107: ("a test message", NOTHING),
    109: ("programs could not take turns on the GPU", RESET),
    110: ("a security fault of the GPU", RESET),
    119: ("the GPU's own processor (GSP) does not answer", RESET),
    120: ("the GPU's own processor (GSP) failed", RESET),
    121: ("an error on the link to the CPU, survived", NOTHING),
    136: ("an NVLink could not be brought up", RESET),
    137: ("an NVLink access was refused", NOTHING),
    140: ("a memory error that ECC could not correct", RESET),
    141: ("an error of a fast path, survived", NOTHING),
    143: ("the GPU could not be started", RESET),
    **dict.fromkeys(range(144, 151), ("an NVLink failed", RESET)),
    151: ("the keys between GPU and CPU could not be changed", REBOOT),
    152: ("an error of a part that compute does not use", NOTHING),
    153: ("an error of a part that compute does not use", NOTHING),
    154: ("the driver changed what the GPU needs", RESET),
    155: ("software put an NVLink out of service", RESET),
    156: ("a part of the GPU was retired, which the next reset does", RESET),
    157: ("a part of the GPU could not be retired", LOOK),
    158: ("the GPU did not answer in time", RESET),
    159: ("an error on the link to the CPU", LOOK),
    160: ("a memory channel was retired", NOTHING),
    161: ("a memory channel could not be retired", NOTHING),
    162: ("power smoothing works again", NOTHING),
    163: ("power smoothing is off", NOTHING),
    164: ("power smoothing nears its end of life", LOOK),
    165: ("power smoothing is at its end of life", LOOK),
    167: ("the PCIe link did not answer in time", REBOOT),
    168: ("the GPU has less memory than it should", LOOK),
    169: ("a controller inside the GPU halted", RESET),
    171: ("details of a memory error that ECC could not correct", RESET),
    172: ("details of a memory error that ECC could not correct", RESET),
}
# What programs do, and the codes that only tell of others.
IGNORED = (13, 31, 43, 45, 68)

# Errors that the switch corrects by itself or that need nothing.
SXIDS_HARMLESS = frozenset(
    {
        *(11012, 11021, 11022, 11023, 12021, 12023, 15008, 15011, 19049, 19055, 19057, 19059),
        *(19062, 19065, 19068, 19071, 20001, 20009, 22013, 24001, 24002, 24003, 10005),
    }
)
# After these only a restart of the host brings the whole fabric back.
SXIDS_ALWAYS_FATAL = frozenset({10003, 12020, 22003, 22011, *range(23001, 23018)})

_MESSAGE = re.compile(
    r"(?P<kind>S?Xid) \((?:PCI:)?(?P<device>[0-9A-Fa-f]+(?::[0-9A-Fa-f]+)+(?:\.[0-9A-Fa-f]+)?)"
    r"(?: (?P<instance>GPU-I:\d+))?\): (?P<code>[0-9]{1,6})(?:, ?(?P<rest>.*))?"
)
_OFF_THE_BUS = re.compile(
    r"NVRM:? (?:The NVIDIA )?GPU (?:at )?(?:PCI:)?(?P<device>(?:[0-9A-Fa-f]{4,8}:)?[0-9A-Fa-f]{2}:"
    r"[0-9A-Fa-f]{2})(?:\.[0-9])?: (?P<rest>GPU has fallen off the bus.*)"
)
# The kernel's words for a device that was reset.
_WAS_RESET = re.compile(r"\bnvidia (?P<device>[0-9A-Fa-f:.]+): reset done")
_DRIVER_LOADED = re.compile(r"NVRM: loading NVIDIA UNIX")
_RECOVERY = re.compile(
    r"recovery action changed from \S+ \((?P<before>[^)]*)\) to \S+ \((?P<now>[^)]*)\)"
)


def parse_message(text: str) -> dict[str, Any] | None:
    """Take a kernel message apart: {kind, code, device, instance, message}; None for another.

    ``kind`` is Xid, SXid, ``reset`` for a device that was reset, or ``loaded`` for a driver that
    was loaded, without a device.
    """
    reset = _WAS_RESET.search(text)
    if reset:
        known = {"kind": "reset", "code": 0, "instance": "", "message": text}
        return {**known, "device": reset["device"]}
    if _DRIVER_LOADED.search(text):
        return {"kind": "loaded", "code": 0, "device": "", "instance": "", "message": text}
    match = _MESSAGE.search(text)
    if match:
        return {
            "kind": match["kind"],
            "code": int(match["code"]),
            "device": match["device"],
            "instance": match["instance"] or "",
            "message": text,
        }
    match = _OFF_THE_BUS.search(text)
    if match:
        known = {"kind": "Xid", "code": 79, "instance": "", "message": text}
        return {**known, "device": match["device"]}
    return None


@dataclass
class Event:
    """One thing that happened to one device. ``time_s`` is 0 where it is not known."""

    kind: str
    code: int
    device: str
    instance: str
    time_s: float
    message: str

    @property
    def said(self) -> str:
        """What the message says after the code."""
        return (
            self.message.partition(f": {self.code},")[2].strip()
            or self.message.partition(f" {self.code},")[2].strip()
        )

    @property
    def meaning(self) -> str:
        """What happened, in words."""
        if self.kind == "SXid":
            return "an NVSwitch met an error"
        return XIDS.get(self.code, ("", LOOK))[0]

    @property
    def action(self) -> str:
        """What it asks for: the message's own word where it has one, else that of the lists."""
        if self.kind == "SXid":
            return self._switch_action()
        said = self.said
        if self.code == 154:
            now = _RECOVERY.search(said)
            wanted = now["now"].lower() if now else ""
            if "reboot" in wanted:
                return REBOOT
            return NOTHING if wanted == "none" else RESET
        if self.code in (94, 95) and re.search(r"\bRST: Yes", said):
            return RESET
        if 144 <= self.code <= 150 and re.search(r"\bNon-?fatal\b", said, re.IGNORECASE):
            return NOTHING
        return XIDS.get(self.code, ("", LOOK))[1]

    def _switch_action(self) -> str:
        if self.code in SXIDS_ALWAYS_FATAL:
            return REBOOT
        said = self.said.lower()
        # The switch says itself whether the fault touched what runs over it.
        if said.startswith(("non-fatal", "severity 0")):
            return NOTHING
        if not said.startswith("fatal") and self.code in SXIDS_HARMLESS:
            return NOTHING
        return RESET


def events(lines: Iterable[Mapping[str, Any]]) -> Iterator[Event]:
    """Make events of the messages of a kernel log, in its order; see `parse_message`.

    The lines ``Severity`` and ``Data`` of a switch belong to the line before them.
    """
    open_events: dict[tuple[str, int], Event] = {}
    for line in lines:
        event = Event(
            str(line["kind"]),
            int(line["code"]),
            str(line.get("device", "")),
            str(line.get("instance", "")),
            float(line.get("time_s") or 0.0),
            str(line["message"]),
        )
        key = (event.device, event.code)
        if event.kind == "SXid" and re.match(r"(?:Severity|Data)\b", event.said):
            if key in open_events:
                continue
        elif event.kind == "SXid":
            open_events[key] = event
        yield event


def same_device(one: str, other: str) -> bool:
    """Compare two PCI addresses, which the kernel and nvidia-smi write differently."""
    return _address(one) == _address(other) != ()


def _address(text: str) -> tuple[int, ...]:
    parts = text.partition(".")[0].split(":")
    try:
        numbers = [int(part, 16) for part in parts]
    except ValueError:
        return ()
    return (*([0] * (3 - len(numbers))), *numbers)


@dataclass(frozen=True)
class Fault:
    """All events of one code, told by the most urgent of them.

    ``over`` tells whether what they ask for was done since; ``devices`` names each GPU or switch
    by its PCI address, with the MIG instance where there is one.
    """

    kind: str
    code: int
    action: str
    over: bool
    devices: tuple[str, ...]
    count: int
    meaning: str
    said: str

    @property
    def name(self) -> str:
        """The kind and the code."""
        return f"{self.kind} {self.code}"


def faults(
    lines: Iterable[Mapping[str, Any]],
    *,
    ignore: Collection[int] = IGNORED,
    recovery: Mapping[str, str] | None = None,
) -> list[Fault]:
    """Return what a kernel log asks for, the most urgent first.

    ``lines`` are shaped as of `parse_message`, with ``time_s``. ``recovery`` maps the PCI
    addresses of the GPUs whose driver tells to what it asks for now, such as "None". ``ignore``
    are Xids that are not told.
    """
    told = list(events(lines))
    groups: dict[tuple[str, int, bool], list[Event]] = {}
    for place, event in enumerate(told):
        later = told[place + 1 :]
        if event.kind in ("loaded", "reset") or (event.kind == "Xid" and event.code in ignore):
            continue
        if event.code == 154 and (event.action == NOTHING or _is_outdated(event, later)):
            continue
        over = _is_over(event, later, recovery or {})
        groups.setdefault((event.kind, event.code, over), []).append(event)
    found = [_fault(group, over) for (_, _, over), group in groups.items()]
    return sorted(found, key=lambda each: (each.over, -ACTIONS.index(each.action)))


def _fault(group: Sequence[Event], over: bool) -> Fault:
    # Of those that ask for the same the last one speaks.
    worst = max(reversed(group), key=lambda each: ACTIONS.index(each.action))
    names = dict.fromkeys(
        " ".join(part for part in (each.device, each.instance) if part) for each in group
    )
    devices = tuple(name for name in names if name)
    said = worst.said or worst.message
    return Fault(
        worst.kind, worst.code, worst.action, over, devices, len(group), worst.meaning, said
    )


def _is_outdated(event: Event, later: Iterable[Event]) -> bool:
    """Tell whether the driver changed its mind about a GPU: only its last word counts."""
    return any(
        each.kind == "Xid" and each.code == 154 and same_device(each.device, event.device)
        for each in later
    )


def _is_over(event: Event, later: Iterable[Event], recovery: Mapping[str, str]) -> bool:
    """Tell whether what an event asks for was done: the driver was loaded anew, or the driver
    says of the GPU that nothing is left to do. A reboot begins another log."""
    if event.action not in (RESET, REBOOT):
        return False
    for each in later:
        if each.kind == "loaded":
            return event.action == RESET
        if not same_device(each.device, event.device):
            continue
        if each.kind == "reset" and event.action == RESET:
            return True
        if each.code == 154 and each.action == NOTHING:
            return True
    if event.action == REBOOT or event.kind == "SXid":
        return False
    asked = [now for pci, now in recovery.items() if same_device(pci, event.device)]
    return bool(asked) and all(now.lower() == "none" for now in asked)
