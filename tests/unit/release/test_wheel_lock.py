# SPDX-License-Identifier: Apache-2.0
"""Locks, pins and downloads, with uv and pip answered by the test."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from glm_fleet.core.errors import FleetError
from glm_fleet.core.runner import RunResult
from glm_fleet.release.wheel_lock import (
    Locked,
    Packages,
    WheelTarget,
    check_pins,
    final_lock,
    parse_lock,
)


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


class FakePrograms:
    """Answers uv with a lock and pip with files; records what was asked."""

    def __init__(
        self,
        lock: str = "",
        wheels: dict[str, str] | None = None,
        rc: int = 0,
        said: str = "no solution: a needs b",
    ) -> None:
        self.said = said
        self.lock = lock
        self.wheels = wheels or {}
        self.rc = rc
        self.calls: list[list[str]] = []

    def __call__(self, argv: Any, **_: Any) -> RunResult:
        self.calls.append(list(argv))
        if "compile" in argv:
            return RunResult(self.rc, self.lock, self.said)
        dest = Path(argv[argv.index("--dest") + 1])
        dest.mkdir()
        wanted = Path(argv[-1]).read_text()
        for name, text in self.wheels.items():
            if name.split("-")[0] in wanted:
                (dest / name).write_text(text)
        return RunResult(self.rc, "", self.said)


def packages(runner: FakePrograms, store: Path, **more: Any) -> Packages:
    target = WheelTarget("3.11", "x86_64-manylinux_2_28")
    return Packages(runner, "uv", "python3", target, store, **more)


def test_lock_is_read_and_written() -> None:
    text = (
        "b==2 \\\n    --hash=sha256:22 \\\n    --hash=sha256:11\n# c\nA_x==1+cpu --hash=sha256:33\n"
    )
    assert parse_lock(text) == [Locked("a-x", "1+cpu", ("33",)), Locked("b", "2", ("11", "22"))]
    assert parse_lock("".join(each.as_text() for each in parse_lock(text))) == parse_lock(text)


def test_entry_without_a_hash_is_refused() -> None:
    with pytest.raises(FleetError, match="not pinned with a hash"):
        parse_lock("vllm @ file:///tmp/vllm.whl\n")


def test_platform_tags() -> None:
    tags = WheelTarget("3.11", "x86_64-manylinux_2_28").platform_tags()
    assert tags[0] == "manylinux_2_28_x86_64"
    assert {"manylinux2014_x86_64", "manylinux1_x86_64", "linux_x86_64"} < set(tags)
    with pytest.raises(FleetError, match="manylinux_2_N"):
        WheelTarget("3.11", "windows").platform_tags()


def test_pins() -> None:
    locked = [Locked("torch", "2.13.0+cpu", ("1",)), Locked("triton", "3.6.0", ("1",))]
    assert check_pins(locked, {"torch": "2.13.0", "triton": ""}) == {
        "torch": "2.13.0+cpu",
        "triton": "3.6.0",
    }
    with pytest.raises(FleetError, match=r"triton 3\.6\.0 instead of 3\.5\.0"):
        check_pins(locked, {"triton": "3.5.0"})
    with pytest.raises(FleetError, match="absent"):
        check_pins([], {"torch": "2.11.0"})


def test_no_solution_is_told_in_full(tmp_path: Path) -> None:
    with pytest.raises(FleetError, match="a needs b"):
        packages(FakePrograms(rc=1), tmp_path).compile(["vllm==1"])


# Of uv 0.8 and of pip 25 behind a proxy that signs by itself.
UNKNOWN = (
    "error: Failed to fetch: `https://pypi.org/simple/vllm/`\n"
    "  Caused by: error sending request for url (https://pypi.org/simple/vllm/)\n"
    "  Caused by: invalid peer certificate: UnknownIssuer\n",
    "Could not fetch URL https://pypi.org/simple/a/: There was a problem confirming the ssl "
    "certificate: HTTPSConnectionPool(host='pypi.org', port=443): Max retries exceeded (Caused by "
    "SSLError(SSLCertVerificationError(1, '[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify "
    "failed: unable to get local issuer certificate (_ssl.c:1016)'))) - skipping",
)


@pytest.mark.parametrize("said", UNKNOWN)
def test_a_certificate_of_an_unknown_issuer_is_no_matter_of_versions(
    tmp_path: Path, said: str
) -> None:
    source = packages(FakePrograms(rc=1, said=said), tmp_path)
    with pytest.raises(
        FleetError, match=r"SSL_CERT_FILE=/etc/ssl/certs/ca-certificates\.crt"
    ) as no:
        source.compile(["vllm==1"])
    assert "release_exclude_newer" not in str(no.value)
    with pytest.raises(FleetError, match="SSL_CERT_FILE"):
        source.download([Locked("a", "1", (sha("A"),))])


def test_download_once(tmp_path: Path) -> None:
    wheels = {"a-1-py3-none-any.whl": "A", "b_c-2-py3-none-any.whl": "B"}
    runner = FakePrograms(wheels=wheels)
    locked = [Locked("a", "1", (sha("A"),)), Locked("b-c", "2", (sha("x"), sha("B")))]
    runner.wheels = {"a-1-py3-none-any.whl": "A"}
    local = tmp_path / "local"
    local.mkdir()
    (local / "b_c-2-py3-none-any.whl").write_text("B")
    source = packages(runner, tmp_path / "store", find_links=(str(local),))
    found = source.download(locked)
    assert {name: path.read_text() for name, path in found.items()} == {"a": "A", "b-c": "B"}
    assert source.download(locked) == found
    assert len(runner.calls) == 1
    assert final_lock(locked, found) == (
        f"a==1 \\\n    --hash=sha256:{sha('A')}\nb-c==2 \\\n    --hash=sha256:{sha('B')}\n"
    )


def test_a_damaged_download_is_fetched_again(tmp_path: Path) -> None:
    runner = FakePrograms(wheels={"a-1-py3-none-any.whl": "A"})
    source = packages(runner, tmp_path)
    locked = [Locked("a", "1", (sha("A"),))]
    path = source.download(locked)["a"]
    path.write_text("damaged")
    assert source.download(locked)["a"].read_text() == "A"
    assert len(runner.calls) == 2


def test_wrong_bytes_are_refused(tmp_path: Path) -> None:
    runner = FakePrograms(wheels={"a-1-py3-none-any.whl": "other"})
    with pytest.raises(FleetError, match="a==1"):
        packages(runner, tmp_path).download([Locked("a", "1", (sha("A"),))])
