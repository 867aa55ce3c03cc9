# SPDX-License-Identifier: Apache-2.0
"""A bare clone of the source: refs, pull requests, worktrees, without the operator's settings."""

from __future__ import annotations

import hashlib
import re
import shutil
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import FleetError
from ..core.files import exclusive
from ..core.runner import Runner, RunResult
from .conflict import MARKER_SIZE

_SHA = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_COMMITTER = {
    f"GIT_{role}_{key}": value
    for role in ("AUTHOR", "COMMITTER")
    for key, value in (
        ("NAME", "glm-fleet"),
        ("EMAIL", "glm-fleet@localhost"),
        ("DATE", "2000-01-01T00:00:00+0000"),
    )
}
# The operator's configuration (hooks, signing, merge drivers, rerere) must not decide
# what a release is made of, and nobody sits there to type a password.
_ISOLATION = {
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_TERMINAL_PROMPT": "0",
    "GIT_EDITOR": "true",
    "GIT_ADVICE": "0",
}
_OPTIONS = [
    option
    for setting in (
        "merge.conflictStyle=merge",
        "merge.renames=false",
        "rerere.enabled=false",
        "commit.gpgSign=false",
        "core.hooksPath=/dev/null",
        "core.autocrlf=false",
        "core.quotePath=false",
        "advice.detachedHead=false",
        "gc.auto=0",
        "safe.directory=*",
    )
    for option in ("-c", setting)
]


@dataclass(frozen=True)
class PullRequest:
    """A pull request pinned to ``head`` (full SHA); files under ``drop`` are left out.

    Its commits are picked one by one, or as one commit with ``squash``: the way for a branch
    into which the main line was merged.
    """

    number: int
    head: str
    drop: tuple[str, ...] = ()
    squash: bool = False


@dataclass(frozen=True)
class Resolved:
    """What a remote has: the commit of the ref and where it was found."""

    url: str
    ref: str
    full_ref: str
    sha: str


def without_secret(url: str) -> str:
    """Return a URL without user name and password."""
    return re.sub(r"(?<=://)[^/@]*@", "", url)


class Repository:
    """A remote repository and its bare cached clone below ``cache``.

    ``url`` is what git takes (https, ssh, file, a path); ``mirror`` is asked in its place,
    and may be a bundle file. The clone belongs to ``url``: what a mirror gives is the same.
    """

    def __init__(
        self, url: str, cache: Path, runner: Runner, *, mirror: str = "", timeout: float = 1800
    ) -> None:
        self.url = mirror or url
        self.origin = without_secret(url)
        self.public_url = without_secret(self.url)
        self.git_dir = cache / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}.git"
        self._runner = runner
        self._timeout = timeout

    def git(
        self,
        *args: str,
        cwd: Path | None = None,
        check: bool = True,
        local: bool = True,
        input_text: str | None = None,
    ) -> RunResult:
        """Run git, isolated from the operator's configuration.

        ``cwd`` is a worktree; without it the bare clone is meant, and without ``local``
        no repository at all.
        """
        where = ["--git-dir", str(self.git_dir)] if local and cwd is None else []
        return self._runner(
            ["git", *_OPTIONS, *where, *args],
            cwd=str(cwd) if cwd else None,
            env={**_ISOLATION, **_COMMITTER},
            input_text=input_text,
            timeout=self._timeout,
            check=check,
        )

    def resolve(self, ref: str, pulls: Sequence[PullRequest]) -> Resolved:
        """Ask the remote for the ref and for the head of every pull request; writes nothing.

        Raises `FleetError` for an unreachable remote, an unknown ref or pull request and
        for a pull request whose head moved.
        """
        for pull in pulls:
            if not _SHA.fullmatch(pull.head):
                raise FleetError(
                    f"Pull request {pull.number} is not pinned",
                    expected="head: the full SHA of its last commit",
                    found=f"head: {pull.head!r}",
                    remedy="put the SHA that you reviewed into release_pull_requests",
                )
        full_refs = [ref] if ref.startswith("refs/") else [f"refs/tags/{ref}", f"refs/heads/{ref}"]
        patterns = [*full_refs, *(f"{name}^{{}}" for name in full_refs)]
        patterns += [_pull_ref(pull) for pull in pulls]
        remote = self._list_remote(patterns)
        self._compare_heads(pulls, remote)
        if _SHA.fullmatch(ref):
            return Resolved(self.origin, ref, ref, ref)
        for name in full_refs:
            if name in remote:
                return Resolved(self.origin, ref, name, remote.get(f"{name}^{{}}", remote[name]))
        raise FleetError(
            f"The repository {self.public_url} has no ref {ref}",
            expected="a tag, a branch or a full commit SHA",
            found=f"neither of {', '.join(full_refs)}",
            remedy="correct release_ref",
        )

    def _list_remote(self, patterns: Sequence[str]) -> dict[str, str]:
        done = self.git("ls-remote", "--", self.url, *patterns, local=False, check=False)
        if done.rc != 0:
            raise self._unreachable(done)
        rows = (line.split("\t", 1) for line in done.stdout.splitlines() if "\t" in line)
        return {name: sha for sha, name in rows}

    def _unreachable(self, done: RunResult) -> FleetError:
        said = [line for line in done.stderr.strip().splitlines() if line.strip()]
        return FleetError(
            f"The repository {self.public_url} cannot be read",
            expected="a git repository that answers without asking for a password",
            found=without_secret(said[0]).replace("fatal: ", "") if said else f"status {done.rc}",
            remedy="check release_repository or release_mirror, the network and the credentials "
            "of this host",
        )

    def _compare_heads(self, pulls: Sequence[PullRequest], remote: Mapping[str, str]) -> None:
        for pull in pulls:
            found = remote.get(_pull_ref(pull))
            if found is None:
                raise FleetError(
                    f"The repository {self.public_url} has no pull request {pull.number}",
                    expected=f"the ref {_pull_ref(pull)}",
                    found="no such ref",
                    remedy="correct release_pull_requests, or name the repository that has it",
                )
            if found != pull.head:
                raise FleetError(
                    f"Pull request {pull.number} has moved since it was pinned",
                    expected=f"head {pull.head}",
                    found=f"head {found}",
                    remedy="review what changed; to accept it, set "
                    f"head: {found} in release_pull_requests",
                    details={"pinned": pull.head, "found": found},
                )

    def fetch(self, resolved: Resolved, pulls: Sequence[PullRequest]) -> bool:
        """Bring the ref and the pull requests into the cached clone; tell if it changed.

        A clone that is shallow is completed, because cherry-picking needs the ancestry.
        """
        created = not (self.git_dir / "HEAD").is_file()
        if created:
            self.git_dir.parent.mkdir(parents=True, exist_ok=True)
            self.git("init", "--quiet", "--bare", str(self.git_dir), local=False)
        wanted = [resolved.sha, *(pull.head for pull in pulls)]
        missing = [sha for sha in wanted if not self.has(sha)]
        shallow = self._is_shallow()
        if missing or shallow:
            names = [resolved.full_ref, *(_pull_ref(pull) for pull in pulls)]
            self._fetch_refs(names, unshallow=shallow)
        for sha in wanted:
            if not self.has(sha):
                raise FleetError(
                    f"The commit {sha} did not come with the fetch",
                    expected=f"it in {self.public_url}",
                    found="no such commit",
                    remedy="run again if the repository changed just now; otherwise name a tag "
                    "or branch that contains it",
                )
        if self._is_shallow():
            raise FleetError(
                f"The repository {self.public_url} is itself shallow",
                expected="the whole history: a cherry-pick needs the common ancestor",
                found="a repository that was cloned with --depth",
                remedy="run 'git fetch --unshallow' in that mirror, or name another repository",
            )
        return bool(created or missing or shallow)

    def _fetch_refs(self, names: Sequence[str], *, unshallow: bool) -> None:
        specs = [
            name if _SHA.fullmatch(name) else f"+{name}:refs/glm-fleet/{name[len('refs/') :]}"
            for name in names
        ]
        # A mirror that is shallow itself is told apart below, so its refs are taken.
        options = ["--quiet", "--no-tags", "--force", "--update-shallow"]
        if unshallow:
            options = [*options[:-1], "--unshallow"]
        done = self.git("fetch", *options, "--", self.url, *specs, check=False)
        if done.rc != 0 and any(_SHA.fullmatch(name) for name in names):
            # Not every server gives a bare SHA; its branches and tags may contain it.
            specs = [spec for spec in specs if not _SHA.fullmatch(spec)]
            specs += ["+refs/heads/*:refs/glm-fleet/heads/*", "+refs/tags/*:refs/glm-fleet/tags/*"]
            done = self.git("fetch", *options, "--", self.url, *specs, check=False)
        if done.rc != 0:
            raise self._unreachable(done)

    def has(self, sha: str) -> bool:
        """Tell whether the clone is there and has a commit."""
        return self.git("cat-file", "-e", f"{sha}^{{commit}}", check=False).rc == 0

    def _is_shallow(self) -> bool:
        return self.git("rev-parse", "--is-shallow-repository").stdout.strip() == "true"

    def history(self, commit: str, most: int) -> list[str]:
        """Return a commit and its ancestors along the main line, the nearest first."""
        words = ("rev-list", "--first-parent", f"--max-count={most}", commit)
        return self.git(*words).stdout.split()

    def changed(self, old: str, new: str, below: Sequence[str] = ()) -> list[str]:
        """Return the paths that differ between two commits, all or those ``below`` some."""
        words = ("diff", "--no-renames", "--name-only", "-z", old, new, "--", *below)
        return sorted(path for path in self.git(*words).stdout.split("\0") if path)

    def export(self, commit: str, paths: Sequence[str], folder: Path) -> None:
        """Write files of a commit below ``folder``, but for those that the commit lacks."""
        have = self.tree(commit)
        wanted = [path for path in paths if path in have]
        folder.mkdir(parents=True, exist_ok=True)
        if not wanted:
            return
        with tempfile.TemporaryDirectory() as scratch:
            packed = Path(scratch, "files.tar")
            self.git("archive", "--format=tar", f"--output={packed}", commit, "--", *wanted)
            with tarfile.open(packed) as archive:
                for member in archive:
                    content = archive.extractfile(member)
                    if content and member.name in wanted:
                        target = folder / member.name
                        target.parent.mkdir(parents=True, exist_ok=True)
                        target.write_bytes(content.read())

    def tree(self, commit: str, folder: str = "") -> dict[str, str]:
        """Return the files of a commit below ``folder`` as path -> blob id."""
        below = [folder] if folder else []
        listing = self.git("ls-tree", "-r", "-z", commit, "--", *below).stdout
        rows = (row.split("\t", 1) for row in listing.split("\0") if row)
        return {path: head.split()[2] for head, path in rows if head.split()[1] == "blob"}

    def merge(self, base: str, ours: str, theirs: str) -> tuple[str, str]:
        """Merge three texts as git does; give the result in style merge and in style diff3."""
        shown = []
        with tempfile.TemporaryDirectory() as folder:
            for name, text in (("ours", ours), ("base", base), ("theirs", theirs)):
                Path(folder, name).write_bytes(text.encode())
            for style in ((), ("--diff3",)):
                done = self.git(
                    "merge-file",
                    "-p",
                    *style,
                    f"--marker-size={MARKER_SIZE}",
                    *(str(Path(folder, name)) for name in ("ours", "base", "theirs")),
                    check=False,
                )
                # The status is the number of conflicts; from 128 on it is an error.
                if not 0 <= done.rc < 128:
                    raise FleetError("git cannot merge a file", found=done.stderr.strip()[-300:])
                shown.append(done.stdout)
        return shown[0], shown[1]

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Let one build at a time use the cached clone."""
        with exclusive(self.git_dir.with_suffix(".lock")):
            yield

    @contextmanager
    def worktree(self, commit: str) -> Iterator[Path]:
        """Give a worktree of ``commit`` beside the clone and remove it afterwards.

        What a killed build left there goes first: `lock` is held, so nobody uses it.
        """
        scratch = self.git_dir.with_suffix(".scratch")
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        self.git("worktree", "prune")
        tree = scratch / "tree"
        attributes = self.git_dir / "info" / "attributes"
        attributes.parent.mkdir(exist_ok=True)
        attributes.write_text(f"* conflict-marker-size={MARKER_SIZE}\n")
        try:
            self.git("worktree", "add", "--quiet", "--detach", str(tree), commit)
            yield tree
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
            self.git("worktree", "prune", check=False)


def _pull_ref(pull: PullRequest) -> str:
    return f"refs/pull/{pull.number}/head"
