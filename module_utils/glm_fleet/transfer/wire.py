# SPDX-License-Identifier: Apache-2.0
"""libtorrent's session: torrents put on the wire and taken off it, and what the peers do."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..core.errors import FleetError
from .session import Job, Travel, priorities, resolve, session_settings


class Wire:
    """The session of one agent: it hears the nodes of the job, and nobody else.

    ``engine`` is the module libtorrent; ``view`` the link under which the files are found.
    """

    def __init__(self, job: Job, engine: Any, view: Path) -> None:
        self._lt = engine
        self._job = job
        self._view = view
        self.own = resolve(job.address)
        self.addresses = {
            name: resolve(address) for name, address in job.peers.items() if address != job.address
        }
        states = engine.torrent_status.states
        self.checking = (states.checking_files, states.checking_resume_data)
        settings = session_settings(self.own, job.port, job.rate_limit, len(self.addresses))
        self.session = engine.session(settings)
        allowed = engine.ip_filter()
        allowed.add_rule("0.0.0.0", "255.255.255.255", 1)  # noqa: S104 - blocks all
        allowed.add_rule("::", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", 1)
        for address in self.addresses.values():
            allowed.add_rule(address, address, 0)
        self.session.set_ip_filter(allowed)

    def add(self, travel: Travel, now: float) -> None:
        """Begin to give a bundle, or to take it."""
        lt = self._lt
        parameters = lt.add_torrent_params()
        parameters.ti = lt.torrent_info(lt.bdecode(travel.torrent))
        # A single file at the top is a torrent without a folder.
        entries = travel.bundle.entries
        alone = len(entries) == 1 and "/" not in entries[0].path
        parameters.save_path = str(self._view if alone else self._view.parent)
        flags = parameters.flags & ~(lt.torrent_flags.auto_managed | lt.torrent_flags.paused)
        if travel.held:
            # Without upload_mode a hash that fails makes the engine fetch, over what is here.
            flags |= lt.torrent_flags.seed_mode | lt.torrent_flags.upload_mode
        parameters.flags = flags
        travel.handle = self.session.add_torrent(parameters)
        travel.moved, travel.done, travel.flushed = now, 0, False
        travel.takers = set()

    def remove(self, travel: Travel) -> None:
        """Stop giving and taking a bundle."""
        if travel.handle is not None:
            self.session.remove_torrent(travel.handle)
            travel.handle = None

    def give_only(self, travel: Travel) -> None:
        """Write nothing of this bundle any more."""
        travel.handle.set_flags(self._lt.torrent_flags.upload_mode)

    def look_for_peers(self, travel: Travel) -> None:
        """Share the pieces among those that take, and call the nodes that are not connected."""
        peers = travel.handle.get_peer_info()
        self._divide(travel, peers)
        connected = {str(peer.ip[0]) for peer in peers}
        for address in self.addresses.values():
            if address not in connected:
                travel.handle.connect_peer((address, self._job.port))

    def _divide(self, travel: Travel, peers: Iterable[Any]) -> None:
        """Ask first for this node's part of what only a seed has, see `priorities`."""
        seed = self._lt.peer_info.seed
        takers = {self.own, *(str(peer.ip[0]) for peer in peers if not peer.flags & seed)}
        if takers != travel.takers:
            travel.takers = takers
            count = travel.handle.torrent_file().num_pieces()
            travel.handle.prioritize_pieces(priorities(count, takers, self.own))

    def cannot_listen(self, said: str) -> FleetError:
        """Return the error of a port that is not free, or an address that is not this node's."""
        return FleetError(
            "This node cannot listen for the other nodes",
            expected=f"{self._job.address}:{self._job.port} to be its own and free",
            found=said,
            remedy="set artifact_address of this node, or another artifact_port",
        )

    def traffic(self) -> tuple[int, int]:
        """Return the bytes of files that were received and sent."""
        with warnings.catch_warnings():
            # The engine has no other way to ask for this in one call.
            warnings.simplefilter("ignore", DeprecationWarning)
            status = self.session.status()
        return int(status.total_payload_download), int(status.total_payload_upload)

    def name_of(self, address: str) -> str:
        """Return the node of an address."""
        names = (name for name, each in self.addresses.items() if each == address)
        return next(names, address)

    def explain(self, travel: Travel) -> str:
        """Say why a bundle stands still: who is connected, who has what is missing."""
        pieces = travel.handle.status(self._lt.status_flags_t.query_pieces).pieces
        missing = [number for number, have in enumerate(pieces) if not have]
        peers = travel.handle.get_peer_info()
        text = f"{travel.paths}: {len(missing)} of {len(pieces)} pieces are missing"
        if not peers:
            who = ", ".join(self.addresses)
            return f"{text}; none of {who} can be reached on port {self._job.port}"
        holders = {
            self.name_of(str(peer.ip[0])): sum(peer.pieces[number] for number in missing)
            for peer in peers
        }
        if not any(holders.values()):
            return f"{text}; no node holds them any more (connected: {', '.join(sorted(holders))})"
        silent = ", ".join(sorted(name for name, count in holders.items() if count))
        return f"{text}; {silent} holds some and sends nothing"
