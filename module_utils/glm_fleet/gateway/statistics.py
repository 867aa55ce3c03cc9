# SPDX-License-Identifier: Apache-2.0
"""What HAProxy prints, as data: states and statistics of servers."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..core.errors import FleetError
from ..core.format import parse_count
from ..core.net import join_endpoint

STATE_FILE_VERSION = "1"
# Bits of srv_admin_state. The "configured as disabled" mark (0x04) stays set on a server
# that was made ready later, so it says nothing about the present.
_NAME_COLUMN = 3
_MAINT = 0x01 | 0x02 | 0x20 | 0x40
_DRAIN = 0x08 | 0x10


@dataclass(frozen=True)
class ServerState:
    """One line of ``show servers state``: who it is and what the operator wants of it.

    ``endpoint`` is ``address:port`` with the name as configured, or the IP address.
    """

    backend: str
    name: str
    endpoint: str
    admin_state: str
    line: str
    address: str = ""

    def is_at(self, endpoint: str) -> bool:
        """Tell whether this is where the server is: by its name, or by the address behind it."""
        return endpoint in (self.endpoint, self.address)

    def renamed(self, name: str) -> ServerState:
        """Return the same server under another name."""
        fields = self.line.split(" ")
        fields[_NAME_COLUMN] = name
        return replace(self, name=name, line=" ".join(fields))


@dataclass(frozen=True)
class Statistics:
    """One server line of ``show stat``.

    ``status`` is UP, DOWN, DRAIN or MAINT; a server of weight 0 gets no requests and is DRAIN.
    ``settled`` is true when every check of the last round passed, so that a server that was never
    checked does not count as up.
    """

    status: str
    settled: bool
    check: str
    sessions_current: int
    sessions_total: int
    weight: int
    last_change_s: int


def parse_servers_state(text: str) -> list[ServerState]:
    """Parse ``show servers state``, which is also the format of the server-state file."""
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) < 2 or lines[0].strip() != STATE_FILE_VERSION or lines[1][:2] != "# ":
        raise unexpected_answer("show servers state", "version 1 and a header line", text[:200])
    columns = lines[1][2:].split()
    servers = []
    for line in lines[2:]:
        row = dict(zip(columns, line.split(" ")))
        try:
            bits = int(row["srv_admin_state"])
            address = row["srv_fqdn"] if row["srv_fqdn"] != "-" else row["srv_addr"]
            endpoint = join_endpoint(address, int(row["srv_port"]))
            resolved = join_endpoint(row["srv_addr"], int(row["srv_port"]))
            names = row["be_name"], row["srv_name"]
            weightless = row["srv_uweight"] == "0"
        except (KeyError, ValueError) as error:
            raise unexpected_answer("show servers state", "a line per server", line) from error
        drained = bits & _DRAIN or weightless
        state = "maint" if bits & _MAINT else "drain" if drained else "ready"
        servers.append(ServerState(*names, endpoint, state, line.rstrip(), resolved))
    return servers


def parse_statistics(text: str) -> dict[tuple[str, str], Statistics]:
    """Parse the CSV of ``show stat``; frontends and backend sums are left out."""
    text = text.lstrip()
    if not text.startswith("# pxname,"):
        raise unexpected_answer("show stat", "a CSV table", text[:200])
    found = {}
    try:
        for row in csv.DictReader(text[2:].splitlines(), restval=""):
            if row["svname"] not in ("FRONTEND", "BACKEND"):
                found[row["pxname"], row["svname"]] = _server(row)
    except (csv.Error, KeyError, ValueError) as error:
        words = f"{type(error).__name__}: {error}"[:200]
        raise unexpected_answer("show stat", "a row of figures per server", words) from error
    return found


def parse_waiting(text: str) -> int:
    """Return the requests that wait for a node (``show stat``): for any, or for a certain one."""
    lines = text.splitlines()
    columns = lines[0].removeprefix("# ").split(",") if lines else []
    waiting = 0
    for line in lines[1:]:
        row = dict(zip(columns, line.split(",")))
        if row.get("svname") == "FRONTEND" or not line.strip():
            continue
        try:
            waiting += _count(row["qcur"])
        except (KeyError, ValueError) as error:
            raise unexpected_answer("show stat", "qcur of each server", line[:200]) from error
    return waiting


@dataclass(frozen=True)
class ClientUsage:
    """What a client did at one gateway since HAProxy was started or reloaded.

    ``requests`` are those that were let through, ``refused`` those above a limit, ``failed`` those
    that a node answered with 5xx or did not answer; bytes are of bodies and headers, tokens of
    prompts and answers where the answer tells: one that is no stream.
    """

    name: str
    requests: int
    refused: int
    failed: int
    at_once: int
    bytes_in: int
    bytes_out: int
    tokens_in: int = 0
    tokens_out: int = 0


def parse_clients(text: str) -> list[ClientUsage]:
    """Parse ``show table glm_clients``, by name; a HAProxy without that table has no clients."""
    found = []
    for line in text.splitlines():
        row = dict(field.split("=", 1) for field in line.split() if "=" in field)
        if "key" not in row or "gpc0" not in row:
            continue
        try:
            passed = _count(row["gpc0"])
            found.append(
                ClientUsage(
                    name=row["key"],
                    requests=passed,
                    refused=max(_count(row["http_req_cnt"]) - passed, 0),
                    failed=_count(row["http_fail_cnt"]),
                    at_once=_count(row["conn_cur"]),
                    bytes_in=_count(row["bytes_in_cnt"]),
                    bytes_out=_count(row["bytes_out_cnt"]),
                    tokens_in=_count(row.get("gpt0", "")),
                    tokens_out=_count(row.get("gpt1", "")),
                )
            )
        except (KeyError, ValueError) as error:
            raise unexpected_answer("show table", "counters of each client", line) from error
    return sorted(found, key=lambda each: each.name)


def row_of(statistics: Mapping[tuple[str, str], Statistics], backend: str, name: str) -> Statistics:
    """Return the row of a server that ``show servers state`` lists; raises `FleetError`."""
    if (backend, name) not in statistics:
        known = ", ".join("/".join(each) for each in statistics)[:200]
        raise unexpected_answer("show stat", f"a row of {backend}/{name}", known)
    return statistics[backend, name]


def _server(row: Mapping[str, str]) -> Statistics:
    # "* " marks a check in progress, "UP 1/3" a server on its way down or up.
    check = row["check_status"].removeprefix("* ")
    status = "DRAIN" if row["status"] == "NOLB" else row["status"].split(" ")[0]
    if status == "UP" and row["weight"] == "0":
        status = "DRAIN"
    return Statistics(
        status=status,
        settled=row["status"] == status == "UP" and check in ("L4OK", "L6OK", "L7OK"),
        check=" ".join(part for part in (check, row.get("last_chk", "")) if part),
        sessions_current=_count(row["scur"]),
        sessions_total=_count(row["stot"]),
        weight=_count(row["weight"]),
        last_change_s=_count(row["lastchg"]),
    )


def _count(cell: str) -> int:
    count = parse_count(cell or "0")
    if count is None:
        raise ValueError(f"{cell[:20]!r} is no count")
    return count


def parse_old_workers(text: str) -> list[int]:
    """Return the process ids of the workers that a reload left behind (``show proc``)."""
    pids: list[int] = []
    old = False
    for line in text.splitlines():
        if line.startswith("# "):
            old = line.strip() == "# old workers"
        elif old and line.split()[1:2] == ["worker"]:
            pid = parse_count(line.split()[0])
            if pid is None:
                raise unexpected_answer("show proc", "a process id per worker", line[:200])
            pids.append(pid)
    return pids


def unexpected_answer(command: str, expected: str, found: str) -> FleetError:
    return FleetError(
        f"HAProxy answered '{command}' in an unexpected way",
        expected=expected,
        found=found.strip() or "nothing",
        remedy="check that the socket has `level admin` and belongs to HAProxy 2.6 or newer",
    )
