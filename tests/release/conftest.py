# SPDX-License-Identifier: Apache-2.0
"""vLLM's releases as one git repository, from the source distributions of the index."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lab.settings import CACHE
from lab.source import download, index_url

from . import standin

# The base of the pull request comes first: the others are its children.
RELEASES = (
    standin.BASE,
    *("0.20.2", "0.22.0", "0.22.1", "0.23.0", "0.24.0", "0.25.1", "0.26.0", "0.27.1", "0.28.0"),
    "0.33.0",
)
SDISTS = CACHE / "sdists"
DATE = "2026-06-01T00:00:00+0000"
IDENTITY = {
    "GIT_CONFIG_GLOBAL": "/dev/null",
    **{f"GIT_{who}_NAME": "release tests" for who in ("AUTHOR", "COMMITTER")},
    **{f"GIT_{who}_EMAIL": "release@glm-fleet.invalid" for who in ("AUTHOR", "COMMITTER")},
    **{f"GIT_{who}_DATE": DATE for who in ("AUTHOR", "COMMITTER")},
}


def say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


@dataclass(frozen=True)
class Upstream:
    """A bare repository with a tag per release and the pull request's head."""

    path: Path
    head: str

    def git(self, *args: str, check: bool = True, **more: Any) -> str:
        done = subprocess.run(
            ["git", "--git-dir", str(self.path), *args],
            env={**os.environ, **IDENTITY},
            capture_output=True,
            text=True,
            check=check,
            **more,
        )
        return done.stdout.strip()


def files_of_index() -> dict[str, dict[str, Any]]:
    """The index's entries for vLLM by file name (PEP 691)."""
    url = f"{index_url()}/vllm/"
    request = urllib.request.Request(url, headers={"Accept": "application/vnd.pypi.simple.v1+json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        entries = json.load(response)["files"]
    return {
        each["filename"]: {**each, "url": urllib.parse.urljoin(url, each["url"])}
        for each in entries
    }


def ensure(name: str, folder: Path = SDISTS) -> Path:
    """One file of vLLM from the index; downloaded once, checked by its hash."""
    target = folder / name
    if not target.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        entry = files_of_index()[name]
        say(f"downloading {name} (once)")
        partial = target.with_name(f".part-{name}")
        download(entry["url"], partial, entry["hashes"]["sha256"])
        partial.rename(target)
    return target


def wanted(path: str) -> bool:
    """What the compiler looks at: the Python of the package, and what the stand-in edits."""
    return (path.startswith("vllm/") and path.endswith(".py")) or path in standin.EDITS


def unpack(version: str, tree: Path) -> None:
    with tarfile.open(ensure(f"vllm-{version}.tar.gz")) as packed:
        for member in packed:
            path = member.name.partition("/")[2]
            content = packed.extractfile(member) if wanted(path) else None
            if content:
                target = tree / path
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content.read())


def make_upstream(folder: Path) -> Upstream:
    """Commit every release as a child of the base, and the stand-in on the base."""
    path = folder / "vllm.git"
    subprocess.run(["git", "init", "--quiet", "--bare", str(path)], check=True)
    upstream = Upstream(path, "")
    upstream.git("config", "core.compression", "1")
    head = base = ""
    for version in RELEASES:
        tree = folder / version
        tree.mkdir()
        unpack(version, tree)

        def commit(message: str, *options: str, tree: Path = tree) -> str:
            upstream.git("--work-tree", str(tree), "add", "--all", "--force", ".", cwd=tree)
            content = upstream.git("write-tree")
            return upstream.git("commit-tree", content, *options, input=f"{message}\n")

        made = commit(f"vLLM {version}", *(["-p", base] if base else []))
        upstream.git("tag", f"v{version}", made)
        if not base:
            base = made
            for name, edit in standin.EDITS.items():
                (tree / name).write_text(edit((tree / name).read_text()))
            for name, text in standin.NEW_FILES.items():
                (tree / name).parent.mkdir(parents=True, exist_ok=True)
                (tree / name).write_text(text)
            head = commit("The stand-in", "-p", base)
            upstream.git("update-ref", "refs/pull/38476/head", head)
    return Upstream(path, head)


@pytest.fixture(scope="session")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Upstream:
    return make_upstream(tmp_path_factory.mktemp("upstream"))
