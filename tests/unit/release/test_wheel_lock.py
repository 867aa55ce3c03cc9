# SPDX-License-Identifier: Apache-2.0
"""Locks, pins and downloads, with uv and pip answered by the test."""

from __future__ import annotations

import functools
import hashlib
import http.server
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from glm_fleet.core.errors import FleetError
from glm_fleet.core.runner import RunResult
from glm_fleet.release.installer import installer_environment, run_installer
from glm_fleet.release.wheel_lock import (
    Locked,
    Packages,
    WheelTarget,
    check_pins,
    final_lock,
    parse_lock,
    pin,
    require_pinned,
)

from tests.defaults import ROLES, defaults


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


PINNED = [Locked("a", "1", ("11",)), Locked("b", "2", ("22",)), Locked("vllm", "0.24.0", ("99",))]
FOUND = [
    Locked("a", "1", ("10", "11")),
    Locked("b", "2", ("22",)),
    Locked("vllm", "0.24.0+pr1.g2", ("77",)),
]


def test_the_file_that_was_reviewed_is_taken() -> None:
    assert pin(FOUND, PINNED, apart="vllm") == [PINNED[0], PINNED[1], FOUND[2]]


@pytest.mark.parametrize(
    ("found", "problem"),
    [
        ([FOUND[0], Locked("b", "2.1", ("22",)), FOUND[2]], "b 2.1 instead of 2"),
        ([Locked("a", "1", ("10",)), *FOUND[1:]], "a 1 has other files"),
        ([*FOUND, Locked("c", "3", ("33",))], "c 3 is new"),
        (FOUND[1:], "a is not asked for"),
    ],
)
def test_anything_else_than_was_reviewed_is_refused(found: list[Locked], problem: str) -> None:
    with pytest.raises(FleetError, match="than the recipe was reviewed with") as caught:
        pin(found, PINNED, apart="vllm")
    assert caught.value.found == problem
    assert "release_pinned_locks" in caught.value.remedy


def test_the_base_wheel_is_the_one_that_was_reviewed() -> None:
    require_pinned("vllm", "0.24.0", "99", PINNED)
    require_pinned("vllm", "0.23.0", "1", PINNED)
    with pytest.raises(FleetError, match=r"vllm 0\.24\.0 is another file"):
        require_pinned("vllm", "0.24.0", "98", PINNED)


def test_the_shipped_locks_are_the_pinned_ones_and_are_for_the_default_recipe() -> None:
    given = defaults("release")
    folder = ROLES / "release/files/locks"
    entries = given["release_pinned_locks"]
    assert {each["file"] for each in entries} == {path.name for path in folder.iterdir()}
    for entry in entries:
        text = (folder / entry["file"]).read_text()
        assert hashlib.sha256(text.encode()).hexdigest() == entry["sha256"]
        locked = parse_lock(text)
        assert all(len(each.hashes) == 1 and len(each.hashes[0]) == 64 for each in locked)
        name, _, version = entry["base_wheel"].partition("==")
        assert (name, version) in {(each.name, each.version) for each in locked}
        check_pins(locked, {
            "torch": given["release_expected_torch"], "triton": given["release_expected_triton"]
        })  # fmt: skip
    newest = given["release_cuda_variants"][0]
    assert entries[0]["base_wheel"] == newest["base_wheel"]
    assert entries[0]["constraints"] == given["release_constraints"] + newest["constraints"]
    for name in ("python_version", "platform", "exclude_newer"):
        assert entries[0][name] == given[f"release_{name}"]


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


# -- what the operator has configured for his own work ---------------------------------------
def made_wheel(folder: Path, name: str, version: str) -> Path:
    """Write a wheel with nothing in it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": f"{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n",
    }
    with zipfile.ZipFile(path, "w") as packed:
        for file, text in files.items():
            packed.writestr(f"{info}/{file}", text)
    return path


@pytest.fixture
def index(tmp_path: Path) -> Iterator[str]:
    """Serve a small package index that has glm-probe 1.0."""
    folder = tmp_path / "index" / "glm-probe"
    wheel = made_wheel(folder, "glm_probe", "1.0")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    (folder / "index.html").write_text(f'<a href="{wheel.name}#sha256={digest}">{wheel.name}</a>')

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=str(folder.parent))
    )
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/"
    server.shutdown()
    thread.join()
    server.server_close()


def hostile(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Configure uv and pip in every way that changes what they take."""
    other = home / "other"
    made_wheel(other, "glm_probe", "9.0")
    (home / "constraints.txt").write_text("glm-probe==9.0\n")
    (home / ".config/pip").mkdir(parents=True)
    (home / ".config/pip/pip.conf").write_text(
        f"[global]\nfind-links = {other}\nindex-url = http://127.0.0.1:9/\nno-binary = :all:\n"
    )
    (home / ".config/uv").mkdir()
    (home / ".config/uv/uv.toml").write_text(
        f'find-links = ["{other}"]\nindex-url = "http://127.0.0.1:9/"\nno-index = true\n'
    )
    for name, value in {
        "HOME": str(home),
        "XDG_CONFIG_HOME": str(home / ".config"),
        "UV_FIND_LINKS": str(other),
        "UV_CONSTRAINT": str(home / "constraints.txt"),
        "UV_OVERRIDE": str(home / "constraints.txt"),
        "UV_INDEX": "http://127.0.0.1:9/",
        "UV_EXCLUDE_NEWER": "2001-01-01",
        "UV_NO_BINARY": "1",
        "UV_CACHE_DIR": str(home / "cache"),
        "PIP_FIND_LINKS": str(other),
        "PIP_CONSTRAINT": str(home / "constraints.txt"),
        "PIP_EXTRA_INDEX_URL": "http://127.0.0.1:9/",
        "PIP_NO_INDEX": "1",
        "PIP_NO_BINARY": ":all:",
        "PIP_PRE": "1",
        "PIP_TARGET": str(home / "target"),
    }.items():
        monkeypatch.setenv(name, value)


def test_what_the_operator_configured_for_himself_makes_no_other_release(
    index: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the real uv and pip, and every setting that could lead them elsewhere."""
    hostile(tmp_path / "home", monkeypatch)
    real = Packages(
        run_installer,
        str(Path(sys.executable).with_name("uv")),
        sys.executable,
        WheelTarget("3.11", "x86_64-manylinux_2_28"),
        tmp_path / "store",
        index_url=index,
    )
    locked = real.compile(["glm-probe"])
    assert [(each.name, each.version) for each in locked] == [("glm-probe", "1.0")]
    (wheel,) = real.download(locked).values()
    assert wheel.name == "glm_probe-1.0-py3-none-any.whl"
    assert not (tmp_path / "home/target").exists()


def test_how_a_server_is_reached_stays() -> None:
    given = {
        "PATH": "/bin",
        "PIP_CERT": "/a.pem",
        "UV_HTTP_TIMEOUT": "9",
        "UV_INDEX_SITE_PASSWORD": "x",
        "SSL_CERT_FILE": "/b.pem",
        "HTTPS_PROXY": "http://p",
    }
    theirs = {"PIP_FIND_LINKS": "/w", "UV_PRERELEASE": "allow", "UV_INDEX": "http://x"}
    assert installer_environment({**given, **theirs}) == {
        **given,
        "PIP_CONFIG_FILE": "/dev/null",
        "UV_NO_CONFIG": "1",
    }
    # pip trusts what uv is told to trust, where nobody says otherwise.
    assert installer_environment({"SSL_CERT_FILE": "/b.pem"})["PIP_CERT"] == "/b.pem"
