# SPDX-License-Identifier: Apache-2.0
"""A verdict and its findings: healthy, degraded, broken or unknown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Final, Literal

from ..core.errors import FleetError
from ..node.answer import Facts
from ..serving.probe import Probe
from .hardware import Problem

Verdict = Literal["healthy", "degraded", "broken", "unknown"]
HEALTHY: Final = "healthy"
DEGRADED: Final = "degraded"
BROKEN: Final = "broken"
UNKNOWN: Final = "unknown"
VERDICTS: tuple[Verdict, ...] = (HEALTHY, DEGRADED, BROKEN, UNKNOWN)


@dataclass(frozen=True)
class Limits:
    """From where on a figure is a fault; the ``health_*`` variables of these names.

    ``slow_ratio`` is the share of the fleet's median canary speed below which a node is slow.
    """

    disk_free_percent: float = 5.0
    memory_free_percent: float = 3.0
    gpu_temperature_c: float = 88.0
    slow_ratio: float = 0.6

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Limits:
        """Read plain data. Raises `FleetError` for what is not a limit or not a number."""
        known = {each.name for each in fields(cls)}
        try:
            if not set(data) <= known:
                raise ValueError(f"unknown: {', '.join(sorted(set(data) - known))}")  # noqa: TRY301
            return cls(**{name: float(value) for name, value in data.items()})
        except (TypeError, ValueError) as error:
            raise FleetError(
                "The limits of the health check are not right",
                expected=f"numbers for {', '.join(sorted(known))}",
                found=str(error),
            ) from error


@dataclass(frozen=True)
class Finding:
    """One thing about a host: a ``healthy`` one is a note, which fails nothing."""

    check: str
    verdict: Verdict
    cause: str
    next_step: str = ""


class Judged:
    """What follows from the findings about a host."""

    findings: Sequence[Finding]

    @property
    def verdict(self) -> Verdict:
        """Return the worst verdict of the findings."""
        return worst(self.findings)

    @property
    def reasons(self) -> list[str]:
        """Return what is wrong, a sentence each."""
        return [each.cause for each in faults(self.findings)]

    @property
    def next_step(self) -> str:
        """Return what to do about the first fault."""
        return next((each.next_step for each in faults(self.findings)), "")

    def _summed_up(self) -> dict[str, Any]:
        return {"verdict": self.verdict, "reasons": self.reasons, "next_step": self.next_step}


@dataclass(frozen=True)
class NodeHealth(Judged):
    """One row of the fleet's table; ``gateway`` is {gateway: UP|DOWN|DRAIN|MAINT|absent|?}."""

    name: str
    findings: Sequence[Finding] = ()
    gpus: str = "-"
    release: str = ""
    model: str = ""
    unit: str = ""
    attestation: str = ""
    tokens_per_second: float | None = None
    gateway: Mapping[str, str] = field(default_factory=dict)
    engine: Mapping[str, Any] = field(default_factory=dict)
    problems: Sequence[Problem] = ()
    facts: Facts = field(default_factory=Facts)
    probe: Probe = field(default_factory=Probe)
    baseline: Mapping[str, Any] = field(default_factory=dict)

    @property
    def gateway_cell(self) -> str:
        """Return the one state at all gateways, or each by name when they differ."""
        states = set(self.gateway.values())
        if len(states) <= 1:
            return "".join(states)
        return ", ".join(f"{name} {state}" for name, state in self.gateway.items())

    def as_dict(self) -> dict[str, Any]:
        """Return plain data: the row, and the facts and checks that it was made from."""
        return {**asdict(self), **self._summed_up()}


@dataclass(frozen=True)
class GatewayHealth(Judged):
    """One gateway; ``up`` counts the servers that take requests.

    Each of ``servers`` has ``sent``: the requests it got since the last check. ``clients`` is
    what each client did: see `gateway.statistics.ClientUsage`. ``certificates`` are those that it
    serves with, as {path, expires_s}.
    """

    name: str
    findings: Sequence[Finding] = ()
    version: str = ""
    up: int = 0
    servers: Sequence[Mapping[str, Any]] = ()
    client: Mapping[str, Any] = field(default_factory=dict)
    baseline: Mapping[str, Any] = field(default_factory=dict)
    clients: Sequence[Mapping[str, Any]] = ()
    certificates: Sequence[Mapping[str, Any]] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {**asdict(self), **self._summed_up()}


def worst(findings: Iterable[Finding]) -> Verdict:
    """Return the worst verdict; healthy when there is none."""
    return max((each.verdict for each in findings), key=VERDICTS.index, default=HEALTHY)


def faults(findings: Iterable[Finding]) -> list[Finding]:
    """Return the findings that are more than a note."""
    return [each for each in findings if each.verdict != HEALTHY]
