# SPDX-License-Identifier: Apache-2.0
"""What a host answers when it is asked for its facts, as types: see `facts.read_node`.

What a judge can do without may be missing, because each fact is read on its own. Bytes, MiB,
degrees Celsius, watts, seconds since 1970. What is not described here is kept as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypedDict

from ..core.decode import Amount, Count, Range, Size, Words, decode
from ..core.systemd import UnitState
from ..gateway.answer import CertificateOnDisk, GatewayAnswer
from ..serving.probe import Probe
from ..serving.rehearsals import Rehearsed
from .acceptance.record import FaultEntry

Port = Annotated[int, Range(0, 65535)]
Seconds = Annotated[float, Range(-1e12, 1e12)]


class OsFacts(TypedDict, total=False):
    """The operating system."""

    id: Words
    version: Words
    name: Words
    kernel: Words
    arch: Words


class Clock(TypedDict, total=False):
    """The host's clock, and how far it is ahead of the controller's."""

    epoch_s: Amount
    skew_s: Seconds


class _DiskOptional(TypedDict, total=False):
    existing: Words


class Disk(_DiskOptional):
    """The file system of a path; paths of one ``device`` share its free space."""

    path: Words
    mount: Words
    device: Count
    free_bytes: Count
    total_bytes: Count


class _ProcessOptional(TypedDict, total=False):
    name: Words
    command: Words


class Listener(_ProcessOptional):
    """Who listens on a port; ``pid`` is None when that cannot be seen."""

    port: Port
    pid: Count | None
    user: Words
    unit: Words


class UserFacts(TypedDict, total=False):
    """A user; below 1000 is a system user."""

    exists: bool
    uid: Count
    system: bool


class Link(TypedDict, total=False):
    """Where a symbolic link leads; ``target`` is None when it is none."""

    path: Words
    target: Words | None
    exists: bool


class VllmProcess(_ProcessOptional):
    """A process of a vLLM server."""

    pid: Count
    user: Words
    unit: Words


class _ArtifactOptional(TypedDict, total=False):
    published_at: Amount
    provenance: Mapping[str, Any]


class ArtifactFacts(_ArtifactOptional):
    """A published artifact; ``damage`` names the files that are not as they should be."""

    kind: Words
    id: Words
    bytes: Count
    damage: Sequence[Words]


class _GpuProcessOptional(TypedDict, total=False):
    unit: Words
    used_mib: Count | None


class GpuProcessFacts(_GpuProcessOptional):
    """A process that holds memory of a GPU."""

    pid: Count
    name: Words


class _GpuOptional(TypedDict, total=False):
    serial: Words
    sm_clock_mhz: Count | None
    sm_clock_max_mhz: Count | None
    recovery_told: bool
    temperature_c: int | None
    power_draw_w: Seconds | None
    power_limit_w: Seconds | None


class GpuFacts(_GpuOptional):
    """One GPU: see `gpu.Gpu`."""

    index: Annotated[int, Range(0, 1023)]
    uuid: Words
    bus_id: Words
    name: Words
    memory_total_mib: Count | None
    memory_used_mib: Count | None
    compute_capability: Words | None
    mig_current: Words | None
    mig_pending: Words | None
    ecc_current: Words | None
    volatile_uncorrectable: Count | None
    aggregate_uncorrectable: Count | None
    remap_pending: bool | None
    remap_failure: bool | None
    recovery_action: Words | None
    throttle_reasons: Sequence[Words]
    processes: Sequence[GpuProcessFacts]


class NvlinkFacts(TypedDict):
    """The links between pairs of GPUs, summed up."""

    pairs: Count
    pcie_only: Sequence[Words]


class GpuFactsReport(TypedDict, total=False):
    """All GPUs of a node: see `gpu.GpuReport`."""

    driver_version: Words | None
    cuda_version: Words | None
    gpus: Annotated[Sequence[GpuFacts], Size(1024)]
    nvlink: NvlinkFacts
    error: Words


class FabricFacts(UnitState, total=False):
    """The fabric manager's unit, its version, and how many NVSwitches there are."""

    nvswitches: Count
    version: Words | None


class _XidOptional(TypedDict, total=False):
    device: Words
    instance: Words


class XidFacts(_XidOptional):
    """A line of the kernel about a GPU (Xid), an NVSwitch (SXid) or a driver that was loaded."""

    kind: Literal["Xid", "SXid", "reset", "loaded"]
    code: Count
    time_s: Amount
    message: Words


class FileDamage(TypedDict):
    """One file that has other bytes than its manifest says."""

    path: Words
    reason: Words
    found: Words


class VerifiedArtifact(TypedDict):
    """An artifact of which every byte was read."""

    kind: Words
    id: Words
    damage: Sequence[FileDamage]


class EnvironmentFacts(TypedDict, total=False):
    """What the next start of a node runs from; ``damage`` names the files that are not right."""

    release: Words
    damage: Sequence[Words]


class AcceptanceFacts(TypedDict, total=False):
    """What is known of a node's acceptance: see `acceptance.record.look`."""

    needed: Sequence[Words]
    passed: bool | None
    time_s: Amount
    release: Words
    faults: Annotated[Sequence[FaultEntry], Size(1000)]
    figures: Annotated[Sequence[Mapping[str, Any]], Size(1024)]


class Facts(TypedDict, total=False):
    """The facts of a host; what only some hosts are asked is missing on the others."""

    os: OsFacts
    python: Words
    systemd: Count | None
    commands: Mapping[str, Words | None]
    memory_total_bytes: Count | None
    memory_available_bytes: Count | None
    uptime_s: Amount | None
    clock: Clock
    disks: Annotated[Sequence[Disk], Size(1000)]
    listeners: Annotated[Sequence[Listener], Size(10_000)]
    users: Mapping[str, UserFacts]
    links: Mapping[str, Link | None]
    unit: UnitState
    vllm_processes: Annotated[Sequence[VllmProcess], Size(10_000)]
    artifacts: Annotated[Sequence[ArtifactFacts], Size(10_000)]
    protected: Sequence[Words] | None
    environments: Sequence[Words]
    environment: EnvironmentFacts
    rehearsal: Rehearsed
    certificate: CertificateOnDisk
    staging_bytes: Mapping[str, Count]
    gpu: GpuFactsReport
    acceptance: AcceptanceFacts
    fabric_manager: FabricFacts
    xids: Annotated[Sequence[XidFacts], Size(100_000)]
    attestation: Probe
    attestation_error: Words
    verified: Sequence[VerifiedArtifact]
    verified_error: Words
    gateway: GatewayAnswer
    errors: Annotated[Sequence[Words], Size(1000)]


def decode_facts(host: str, answer: Any) -> Facts:
    """Return a host's answer as facts; raises `FleetError` that names the wrong value."""
    return decode(
        Facts,
        answer,
        what=f"The answer of {host}",
        remedy="look at what gives this value on the host; if nothing is wrong there, check that "
        "nobody else answers under its address",
    )
