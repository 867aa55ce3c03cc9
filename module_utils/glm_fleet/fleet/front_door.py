# SPDX-License-Identifier: Apache-2.0
"""How clients are served: with which certificate, or in clear text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from ..core.errors import FleetError
from ..gateway.answer import FrontDoor
from . import authority as ca

Wish = Literal["auto", "always", "never"]


@dataclass(frozen=True)
class Wanted:
    """What the inventory says of a gateway.

    ``given`` is the file of a certificate of its own, '' for one of the fleet's authority, which
    goes to ``own``. ``names`` have to be in a certificate of the authority, ``told`` in any.
    """

    tls: Wish
    given: str
    own: str
    names: Sequence[str]
    told: Sequence[str]

    @property
    def file(self) -> str:
        return self.given or self.own


@dataclass(frozen=True)
class Decision:
    """How a gateway serves: with the certificate in ``file``, in clear text if that is ''.

    ``issue`` says why the authority issues a new one first; ``warning`` is for the operator.
    """

    file: str
    issue: str = ""
    warning: str = ""


def decide(
    wanted: Wanted,
    gateway: str,
    doors: Mapping[str, FrontDoor],
    authority: ca.Authority | None,
    now: datetime,
    *,
    change: bool = False,
) -> Decision:
    """Decide how a gateway serves clients, by what ``doors`` of all gateways are now.

    A fleet that serves in clear text goes on so until somebody says otherwise: its clients would
    be cut off. ``change`` allows another authority than the one that clients trust. Raises
    `FleetError` for a certificate that clients would refuse.
    """
    if wanted.tls == "never":
        return Decision("")
    found = doors[gateway]["certificate"]
    if wanted.given:
        _check_given(found["path"], found["error"], found.get("chain", ""), wanted.told, now)
        return Decision(wanted.given)
    clear = sorted(name for name, door in doors.items() if door["serves"] == "clear")
    if wanted.tls == "auto" and clear:
        return Decision("", warning=_in_clear_text(clear))
    chain = "" if found["error"] else found.get("chain", "")
    if change and chain and not ca.is_of(authority, chain):
        return Decision(wanted.own, issue="another authority is to sign it")
    why = ca.why_new(chain, [*wanted.names, *wanted.told], now) if chain else found["error"]
    if why and not change:
        _refuse_stranger(doors, authority)
    return Decision(wanted.own, issue=why)


def _check_given(path: str, error: str, chain: str, told: Sequence[str], now: datetime) -> None:
    fault = error or ca.wrong_with(chain, told, now)
    if fault:
        raise FleetError(
            "Clients would refuse the certificate of this gateway",
            expected="certificate, chain and key in one PEM file, in this order, that are valid "
            f"now{' and stand for ' + ', '.join(told) if told else ''}",
            found=f"{path}: {fault}",
            remedy="put the right file there, or correct gateway_tls_certificate or "
            "gateway_tls_names; nothing was changed",
        )


def _refuse_stranger(doors: Mapping[str, FrontDoor], authority: ca.Authority | None) -> None:
    """Refuse to issue what clients would not trust: an authority that is not ours is in use."""
    for name, door in doors.items():
        found = door["certificate"]
        chain = "" if found["error"] else found.get("chain", "")
        if ca.is_of_a_fleet(chain) and not ca.is_of(authority, chain):
            raise FleetError(
                "Clients would not trust a certificate of this controller's authority",
                expected="in gateway_authority, the authority that signed the certificate of "
                f"{name}",
                found="another one" if authority else "none",
                remedy="copy that folder from the controller or the backup that has it; or, when "
                "it is lost, run again with -e gateway_authority_change=true and give clients the "
                "new ca.crt",
            )


def _in_clear_text(clear: Sequence[str]) -> str:
    return (
        f"{', '.join(clear)} serves clients in clear text, as it did before, so that none is cut "
        "off. To go over to TLS, give clients the authority's ca.crt and https addresses and set "
        "gateway_tls to always; to leave it as it is without this warning, set it to never."
    )
