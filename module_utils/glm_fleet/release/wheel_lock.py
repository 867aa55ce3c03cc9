# SPDX-License-Identifier: Apache-2.0
"""The exact set of wheels of a release: resolved as of a date, hashed, downloaded once.

uv resolves, pip downloads (uv has no command for it), and what arrives is hashed here.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import FleetError
from ..core.files import copy_whole, link_or_copy, sha256_file
from ..core.runner import Runner
from .wheel import canonical

# pip throws away what a killed call had downloaded. Few wheels in a call keep that loss small.
_BATCH = 20
_WORKERS = 3
_TIMEOUT = 3600.0
_PLATFORM = re.compile(r"(?P<machine>x86_64|aarch64)-manylinux_2_(?P<glibc>\d+)")
_LEGACY = ((17, "manylinux2014"), (12, "manylinux2010"), (5, "manylinux1"))
_OLDEST_GLIBC = 5
# uv's words, and OpenSSL's, which pip prints.
_CERTIFICATE = re.compile(r"UnknownIssuer|CERTIFICATE_VERIFY_FAILED|self[- ]signed certificate")


@dataclass(frozen=True)
class Locked:
    """One distribution of a lock with the SHA-256 of every file that may be it."""

    name: str
    version: str
    hashes: tuple[str, ...]

    def as_text(self) -> str:
        """Return it as a requirement with hashes, over several lines."""
        hashes = "".join(f" \\\n    --hash=sha256:{each}" for each in self.hashes)
        return f"{self.name}=={self.version}{hashes}\n"


@dataclass(frozen=True)
class WheelTarget:
    """The node that wheels are for: Python ``3.12``, platform ``x86_64-manylinux_2_31``."""

    python_version: str
    platform: str

    def pip_options(self) -> list[str]:
        """Return the options that make pip choose for the target and not for this host."""
        options = ["--python-version", self.python_version, "--implementation", "cp"]
        return options + [word for tag in self.platform_tags() for word in ("--platform", tag)]

    def platform_tags(self) -> list[str]:
        """Return every platform tag that the target can use, newest first."""
        match = _PLATFORM.fullmatch(self.platform)
        if match is None:
            raise FleetError(
                f"The platform {self.platform!r} is not known",
                expected="x86_64-manylinux_2_N or aarch64-manylinux_2_N, N the nodes' glibc",
                found=self.platform,
                remedy="correct release_platform",
            )
        tags = []
        for glibc in range(int(match["glibc"]), _OLDEST_GLIBC - 1, -1):
            tags.append(f"manylinux_2_{glibc}_{match['machine']}")
            tags += [f"{name}_{match['machine']}" for version, name in _LEGACY if version == glibc]
        return [*tags, f"linux_{match['machine']}"]


@dataclass(frozen=True)
class Packages:
    """Where packages come from and for whom: the surroundings of `compile` and `download`.

    ``index_url`` is empty for the index of the environment; ``index_urls`` are searched
    before it; ``exclude_newer`` is a date
    (``2026-06-20`` or RFC 3339); ``store`` keeps the downloaded wheels of every target.
    """

    runner: Runner
    uv: str
    python: str
    target: WheelTarget
    store: Path
    exclude_newer: str = ""
    index_url: str = ""
    index_urls: tuple[str, ...] = ()
    find_links: tuple[str, ...] = ()

    def compile(
        self, requirements: Iterable[str], *, with_dependencies: bool = True
    ) -> list[Locked]:
        """Resolve ``requirements`` to exact versions with hashes; wheels only.

        Raises `FleetError` with uv's explanation when there is no solution.
        """
        options = [] if with_dependencies else ["--no-deps"]
        if self.exclude_newer:
            options += ["--exclude-newer", self.exclude_newer]
        for place in self.find_links:
            options += ["--find-links", place]
        lines = list(requirements)
        done = self.runner(
            [
                self.uv,
                "pip",
                "compile",
                "--quiet",
                "--no-header",
                "--no-annotate",
                "--generate-hashes",
                "--only-binary",
                ":all:",
                "--python-version",
                self.target.python_version,
                "--python-platform",
                self.target.platform,
                *options,
                "-",
            ],
            env={**self._index(), "UV_PYTHON_DOWNLOADS": "never", "NO_COLOR": "1"},
            input_text="".join(f"{line}\n" for line in lines),
            timeout=_TIMEOUT,
            check=False,
        )
        if done.rc != 0:
            raise FleetError(
                "The dependencies cannot be resolved",
                expected=f"a set of wheels for Python {self.target.python_version} on "
                f"{self.target.platform} as of {self.exclude_newer or 'now'} with "
                f"{', '.join(lines)}",
                found=done.stderr.strip()[-2000:],
                remedy=_trust(done.stderr)
                or "change release_exclude_newer, release_constraints, release_platform or "
                "release_find_links; a package without wheels has to be built into a folder of "
                "release_find_links",
            )
        return parse_lock(done.stdout)

    def download(self, locked: Sequence[Locked]) -> dict[str, Path]:
        """Return the wheel of every entry, downloading what the store lacks.

        Every wheel is hashed. What a killed run has brought stays.
        """
        folder = (
            self.store / f"cp{self.target.python_version.replace('.', '')}-{self.target.platform}"
        )
        folder.mkdir(parents=True, exist_ok=True)
        found = _matching(locked, [folder])
        # Folders on this host are as good as a download, without asking an index.
        local = [Path(place) for place in self.find_links if Path(place).is_dir()]
        rest = [each for each in locked if each.name not in found]
        for name, path in _matching(rest, local).items():
            # Copied: the folder is not ours, and links would share their mode with it.
            found[name] = copy_whole(path, folder / path.name)
        missing = [each for each in locked if each.name not in found]
        batches = [missing[start : start + _BATCH] for start in range(0, len(missing), _BATCH)]
        with ThreadPoolExecutor(_WORKERS) as pool:
            for _ in pool.map(lambda batch: self._fetch(batch, folder), batches):
                pass
        found.update(_matching(missing, [folder]))
        lost = [f"{each.name}=={each.version}" for each in locked if each.name not in found]
        if lost:
            raise FleetError(
                f"{len(lost)} wheel(s) did not arrive or have another hash",
                expected="every wheel of the lock",
                found=", ".join(lost),
                remedy="run again; if it stays so, the index serves other files than it listed",
            )
        return found

    def _fetch(self, batch: Sequence[Locked], folder: Path) -> None:
        with tempfile.TemporaryDirectory(prefix=".incoming-", dir=folder) as name:
            scratch = Path(name)
            wanted = scratch / "wanted.txt"
            wanted.write_text("".join(each.as_text() for each in batch))
            arrived = scratch / "wheels"
            links = [word for place in self.find_links for word in ("--find-links", place)]
            done = self.runner(
                [
                    self.python,
                    "-m",
                    "pip",
                    "download",
                    "--quiet",
                    "--disable-pip-version-check",
                    "--no-input",
                    "--no-deps",
                    "--require-hashes",
                    "--only-binary",
                    ":all:",
                    *self.target.pip_options(),
                    *links,
                    "--dest",
                    str(arrived),
                    "--requirement",
                    str(wanted),
                ],
                env=self._index(),
                timeout=_TIMEOUT,
                check=False,
            )
            if done.rc != 0:
                raise FleetError(
                    "Wheels of the lock cannot be downloaded",
                    expected=", ".join(f"{each.name}=={each.version}" for each in batch),
                    found=done.stderr.strip()[-1500:],
                    remedy=_trust(done.stderr)
                    or "check the network and the package index; wheels that arrived are kept",
                )
            for wheel in arrived.iterdir():
                wheel.replace(folder / wheel.name)

    def _index(self) -> dict[str, str]:
        """Name one index to both programs, through the environment and not for ps to show."""
        known = ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "PIP_INDEX_URL")
        url = self.index_url or next(
            (os.environ[name] for name in known if os.environ.get(name)), ""
        )
        names = {"UV_DEFAULT_INDEX": url, "PIP_INDEX_URL": url} if url else {}
        if self.index_urls:
            more = " ".join(self.index_urls)
            names |= {"UV_INDEX": more, "PIP_EXTRA_INDEX_URL": more}
        return names


def parse_lock(text: str) -> list[Locked]:
    """Read requirements of the form ``name==version`` with ``--hash=sha256:`` lines."""
    locked = []
    for entry in text.replace("\\\n", " ").splitlines():
        words = entry.split()
        if not words or words[0].startswith("#"):
            continue
        name, separator, version = words[0].partition("==")
        hashes = [
            word[len("--hash=sha256:") :] for word in words if word.startswith("--hash=sha256:")
        ]
        if not separator or not hashes:
            raise FleetError(
                "The lock has an entry that is not pinned with a hash",
                expected="name==version --hash=sha256:...",
                found=entry.strip()[:200],
                remedy="requirements must come from an index or a folder, not from a URL",
            )
        locked.append(Locked(canonical(name), version, tuple(sorted(hashes))))
    return sorted(locked, key=lambda each: each.name)


def final_lock(locked: Sequence[Locked], wheels: Mapping[str, Path]) -> str:
    """Return the lock with the one hash of the wheel that is in the release."""
    return "".join(
        Locked(each.name, each.version, (sha256_file(wheels[each.name]),)).as_text()
        for each in locked
    )


def pin(locked: Sequence[Locked], pinned: Sequence[Locked], *, apart: str) -> list[Locked]:
    """Return the lock with the one file of each package that was reviewed.

    ``pinned`` is the lock of the recipe, with one hash each; the package ``apart`` is made here,
    and compared by nobody. Raises `FleetError` where the index gives anything else today.
    """
    found = {each.name: each for each in locked if each.name != apart}
    wanted = {each.name: each for each in pinned if each.name != apart}
    other = []
    for name in sorted({*found, *wanted}):
        if name not in found:
            other.append(f"{name} is not asked for")
        elif name not in wanted:
            other.append(f"{name} {found[name].version} is new")
        elif found[name].version != wanted[name].version:
            other.append(f"{name} {found[name].version} instead of {wanted[name].version}")
        elif not {*wanted[name].hashes} <= {*found[name].hashes}:
            other.append(f"{name} {found[name].version} has other files")
    if other:
        raise FleetError(
            f"The index gives {len(other)} other package(s) than the recipe was reviewed with",
            expected=f"the {len(wanted)} files of the pinned lock",
            found="; ".join(other[:20]),
            remedy="find out what changed on the index; to take what it gives now, take the lock "
            "out of release_pinned_locks",
        )
    return [wanted.get(each.name, each) for each in locked]


def require_pinned(name: str, version: str, sha256: str, pinned: Sequence[Locked]) -> None:
    """Refuse a wheel that is another file than the one in the lock of the recipe."""
    hashes = {hash_ for each in pinned if (each.name, each.version) == (canonical(name), version)
              for hash_ in each.hashes}  # fmt: skip
    if hashes and sha256 not in hashes:
        raise FleetError(
            f"The wheel {name} {version} is another file than the recipe was reviewed with",
            expected=f"SHA-256 {', '.join(sorted(hashes))}",
            found=f"SHA-256 {sha256}",
            remedy="find out what changed on the index; to take what it gives now, take the lock "
            "out of release_pinned_locks",
        )


def check_pins(locked: Sequence[Locked], expected: Mapping[str, str]) -> dict[str, str]:
    """Compare versions with what is expected (empty: not checked); return those found.

    An expectation without a local label accepts any (``2.11.0`` takes ``2.11.0+cu130``).
    """
    versions = {each.name: each.version for each in locked}
    wrong = []
    for name, wanted in expected.items():
        found = versions.get(canonical(name), "")
        if wanted and wanted not in (found, found.partition("+")[0]):
            wrong.append(f"{name} {found or 'absent'} instead of {wanted}")
    if wrong:
        raise FleetError(
            "The lock has other versions than the release expects",
            expected=", ".join(f"{name} {wanted}" for name, wanted in expected.items() if wanted),
            found="; ".join(wrong),
            remedy="correct release_expected_* or the base wheel and the date of the lock",
        )
    return {name: versions.get(canonical(name), "") for name in expected}


def _trust(said: str) -> str:
    """Return what to do when the index's certificate is of nobody that uv or pip knows; else ''.

    uv brings its own list of authorities: one that the site put into the system's is not in it.
    """
    if not _CERTIFICATE.search(said):
        return ""
    return (
        "someone whom uv and pip do not know signed the certificate of the index, such as a proxy "
        "of this site. On the builder, export SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt, or "
        "the site's own bundle, and PIP_CERT with the same path; then run again"
    )


def _matching(locked: Sequence[Locked], folders: Sequence[Path]) -> dict[str, Path]:
    """Find the wheels in ``folders`` whose name, version and hash an entry names."""
    wanted = {(each.name, each.version): each for each in locked}
    found = {}
    for folder in folders:
        for path in sorted(folder.glob("*.whl")):
            name, _, rest = path.name.partition("-")
            entry = wanted.get((canonical(name), rest.partition("-")[0]))
            if entry and entry.name not in found and sha256_file(path) in entry.hashes:
                found[entry.name] = path
    return found


def gather(wheels: Iterable[Path], folder: Path) -> None:
    """Put wheels into a folder, as links to the same bytes where possible."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in wheels:
        link_or_copy(path, folder / path.name)
