# SPDX-License-Identifier: Apache-2.0
"""A certificate on the disk: is it there, does its key belong to it, and until when is it good?"""

from __future__ import annotations

import re
import ssl
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

_SEQUENCE, _UTC_TIME, _TIME = 0x30, 0x17, 0x18
_BLOCK = re.compile(r"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", re.DOTALL)


def read_certificate(path: Path) -> dict[str, Any]:
    """Return {path, error, expires_s, chain} of a PEM file with certificate, chain and key.

    ``error`` is '' when HAProxy can use it; ``expires_s`` is in seconds since 1970, 0 if unknown.
    ``chain`` are its certificates in PEM, without the key.
    """
    found: dict[str, Any] = {"path": str(path), "error": "", "expires_s": 0.0, "chain": ""}
    try:
        text = path.read_text()
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(path)
        blocks = _BLOCK.findall(text)
        if blocks:
            found["expires_s"] = not_after(ssl.PEM_cert_to_DER_cert(blocks[0]))
            found["chain"] = "\n".join((*blocks, ""))
    except FileNotFoundError:
        found["error"] = "there is no such file"
    except ssl.SSLError as error:
        found["error"] = (
            "certificate and key do not belong together"
            if "MISMATCH" in str(error)
            else "it holds no certificate with its key in PEM form"
        )
    except (OSError, UnicodeDecodeError, ValueError, IndexError) as error:
        found["error"] = f"it cannot be read: {error}"
    return found


def not_after(der: bytes) -> float:
    """Return when a certificate ends, in seconds since 1970. Raises `ValueError`.

    X.509 (RFC 5280): Certificate, TBSCertificate; in it version, serial number, algorithm, issuer,
    and then the validity, whose second time is the end.
    """
    _, certificate, _ = _element(der, 0)
    _, body, _ = _element(certificate, 0)
    position = 0
    tag, _, position = _element(body, position)
    if tag == 0xA0:  # the version, which old certificates leave out
        _, _, position = _element(body, position)
    for _ in range(2):
        _, _, position = _element(body, position)
    tag, validity, _ = _element(body, position)
    if tag != _SEQUENCE:
        raise ValueError("this is no X.509 certificate")
    _, _, second = _element(validity, 0)
    tag, words, _ = _element(validity, second)
    form = {_UTC_TIME: "%y%m%d%H%M%SZ", _TIME: "%Y%m%d%H%M%SZ"}.get(tag)
    if form is None:
        raise ValueError("the end of its validity is no time")
    parsed = datetime.strptime(words.decode("ascii"), form)
    return parsed.replace(tzinfo=timezone.utc).timestamp()


def _element(data: bytes, begin: int) -> tuple[int, bytes, int]:
    """Return (tag, content, where the next one begins) of a DER element."""
    tag, length, position = data[begin], data[begin + 1], begin + 2
    if length & 0x80:
        count = length & 0x7F
        length = int.from_bytes(data[position : position + count], "big")
        position += count
    end = position + length
    if end > len(data):
        raise ValueError("it ends too early")
    return tag, data[position:end], end
