# SPDX-License-Identifier: Apache-2.0
"""What a gateway tells about itself, as types: see `haproxy.describe` and `node.gateway`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, TypedDict

from ..core.decode import Amount, Count, Range, Size, Words

AdminState = Literal["ready", "drain", "maint"]


class _ServerOptional(TypedDict, total=False):
    backend: Words
    address: Words
    port: Annotated[int, Range(0, 65535)]
    admin_state: AdminState
    check: Words
    sessions_current: Count
    sessions_total: Count
    weight: Count
    last_change_s: int


class Server(_ServerOptional):
    """One server of HAProxy; ``status`` is UP, DOWN, DRAIN, MAINT or another word of HAProxy's."""

    name: Words
    status: Words


class ClientAnswer(TypedDict, total=False):
    """What a request through the front door gave; ``status`` is 0 without an answer."""

    status: Annotated[int, Range(0, 999)]
    seconds: Amount
    node: Words | None
    error: Words


class _UsageOptional(TypedDict, total=False):
    tokens_in: Count
    tokens_out: Count


class Usage(_UsageOptional):
    """What a client did since HAProxy was started or reloaded: see `statistics.ClientUsage`."""

    name: Words
    requests: Count
    refused: Count
    failed: Count
    at_once: Count
    bytes_in: Count
    bytes_out: Count


class Hold(TypedDict):
    """Who holds a node out of service, since when and why."""

    by: Words
    at: Words
    reason: Words


class CertificateFacts(TypedDict):
    """A certificate of the front door; ``expires_s`` in seconds since 1970."""

    path: Words
    expires_s: Amount


class _CertificateOptional(TypedDict, total=False):
    chain: str


class CertificateOnDisk(_CertificateOptional):
    """The PEM file of a gateway; ``error`` is '' when HAProxy can use it, times since 1970.

    ``chain`` are its certificates in PEM, without the key.
    """

    path: Words
    error: Words
    expires_s: Annotated[float, Range(-1e12, 1e12)]


class FrontDoor(TypedDict):
    """A certificate on a gateway's disk, and how its configuration serves clients.

    ``serves`` is "tls" or "clear", and "" where there is no configuration of ours.
    """

    certificate: CertificateOnDisk
    serves: Literal["tls", "clear", ""]


class GatewayAnswer(TypedDict, total=False):
    """A gateway; ``valid`` says whether HAProxy answered every question."""

    valid: bool
    version: Words
    revision: Words
    tls: bool
    uptime_s: Count
    servers: Annotated[Sequence[Server], Size(10_000)]
    # Not there in what an earlier version said.
    waiting: Count
    errors: Annotated[Sequence[Words], Size(1000)]
    config_error: Words
    config_edited: bool
    certificates: Sequence[CertificateFacts]
    client: ClientAnswer
    clients: Annotated[Sequence[Usage], Size(100_000)]
    held: Mapping[str, Hold]
    held_error: Words
