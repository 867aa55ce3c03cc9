# SPDX-License-Identifier: Apache-2.0
"""From a repository, a ref and pinned pull requests to a patched, verified source.

A bare clone is kept as cache. Every build works in a scratch worktree of its own, which
is removed on success and on failure. Commits get a fixed committer, so that the same
inputs give the same commit ids.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.check import Check
from ..core.errors import FleetError
from .conflict import MARKER_SIZE, Join, Versions
from .corrections import Correction, correct
from .corrections import fitting as fitting_corrections
from .git import PullRequest, Repository, Resolved
from .merge import Resolver
from .recorded import Recorded, Resolution, fitting
from .verify.model import FileVersions, SourceExpectations
from .verify.tree import verify_tree

# What a manifest names where a person resolved a conflict.
RECORDED = "recorded-resolution"

# Modes of git: a symbolic link, and a commit of another repository.
_LINKS = ("120000", "160000")


@dataclass(frozen=True)
class Patched:
    """The result of a build: commit, files to overlay and the report."""

    commit: str
    changed: tuple[str, ...]
    dropped: tuple[str, ...]
    joins: tuple[Join, ...]
    checks: tuple[Check, ...]
    commits: tuple[str, ...]
    corrections: tuple[Correction, ...] = ()

    def report(self) -> dict[str, Any]:
        """Return what the manifest tells about the source."""
        return {
            "commit": self.commit,
            "picked_commits": list(self.commits),
            "changed_files": list(self.changed),
            "dropped_files": list(self.dropped),
            "conflicts": [join.as_dict() for join in self.joins],
            "corrections": [each.as_dict() for each in self.corrections],
            "checks": [check.as_dict() for check in self.checks],
        }


@dataclass
class _Done:
    """What the pull requests so far left; ``blobs`` are {path: blob} of corrected files."""

    joins: list[Join] = field(default_factory=list)
    picked: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    versions: list[FileVersions] = field(default_factory=list)
    corrected: list[Correction] = field(default_factory=list)
    blobs: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Compiler:
    """Puts pull requests onto a ref: cherry-pick, join, verify, export."""

    repository: Repository
    resolver: Resolver
    expectations: SourceExpectations
    resolutions: tuple[Resolution, ...] = ()
    corrections: tuple[Correction, ...] = ()

    def build(self, resolved: Resolved, pulls: Sequence[PullRequest], *, dest: Path) -> Patched:
        """Patch ``resolved`` and write the changed files below ``dest``.

        ``dest`` is written only when every check passed; the worktree never
        outlives the call. Raises `FleetError` otherwise, with the failed checks or
        the conflicts in its details.
        """
        repo = self.repository
        with repo.lock(), repo.worktree(resolved.sha) as tree:
            done = _Done()
            for pull in pulls:
                self._put_on(tree, resolved, pull, done)
            commit = self._head(tree)
            changed = self.repository.changed(resolved.sha, commit)
            checks = self._verify(tree, resolved, changed, done)
            _export(tree, changed, dest)
            return Patched(
                commit=commit,
                changed=tuple(changed),
                dropped=tuple(done.dropped),
                joins=tuple(done.joins),
                checks=tuple(checks),
                commits=tuple(done.picked),
                corrections=tuple(done.corrected),
            )

    def _put_on(self, tree: Path, resolved: Resolved, pull: PullRequest, done: _Done) -> None:
        """Put one pull request onto what the tree has, with its corrections."""
        before = self._head(tree)
        base = self._merge_base(before, pull)
        recorded = fitting(self.resolutions, resolved.sha, pull.head)
        commits = self._commits(base, pull)
        if pull.squash:
            commits = [self._squashed(base, pull)]
        for commit in commits:
            done.joins += self._pick(tree, commit, pull, recorded)
        _require_used(recorded, done.joins)
        done.dropped += self._drop(tree, before, pull)
        done.picked += commits
        added = self._versions(base, pull, before, tree)
        done.versions += added
        # What a later pull request changes once more is not what the correction made of it.
        for file in added:
            done.blobs.pop(file.path, None)
        found = self._correct(tree, resolved.sha, pull)
        done.blobs |= {change.path: change.after for each in found for change in each.changes}
        done.corrected += found

    def _verify(
        self, tree: Path, resolved: Resolved, changed: Sequence[str], done: _Done
    ) -> list[Check]:
        """Return the checks of the whole result; raise where one did not pass."""
        checks = verify_tree(
            tree,
            changed=tuple(changed),
            # Of the indexer too where a pull request's own branch is the ref.
            before={
                path: self._text(resolved.sha, path)
                for path in {*changed, self.expectations.indexer}
            },
            versions=done.versions,
            expectations=self.expectations,
            merge=self.repository.merge,
            decided={join.path for join in done.joins if join.rule == RECORDED},
            corrected=done.blobs,
        )
        failed = [check for check in checks if not check.passed]
        if failed:
            raise FleetError(
                f"The patched source did not pass {len(failed)} of {len(checks)} checks",
                expected="every check passed",
                found="; ".join(f"{check.name}: {check.detail}" for check in failed),
                remedy="do not ship this merge: name a rebased pull request or another ref",
                details={"checks": [check.as_dict() for check in checks]},
            )
        return checks

    def _head(self, tree: Path) -> str:
        return self.repository.git("rev-parse", "HEAD", cwd=tree).stdout.strip()

    def _merge_base(self, before: str, pull: PullRequest) -> str:
        found = self.repository.git("merge-base", before, pull.head, check=False)
        if found.rc != 0:
            raise FleetError(
                f"Pull request {pull.number} has no history in common with the ref",
                expected="a common ancestor",
                found="none",
                remedy="name the repository that the pull request was opened in",
            )
        return found.stdout.split()[0]

    def _commits(self, base: str, pull: PullRequest) -> list[str]:
        git = self.repository.git
        span = f"{base}..{pull.head}"
        merges = git("rev-list", "--merges", span).stdout.split()
        if merges and not pull.squash:
            raise FleetError(
                f"Pull request {pull.number} contains merge commits",
                expected="a straight series of commits: a merge hides how it was resolved",
                found=", ".join(merges),
                remedy="set squash: true for it in release_pull_requests to apply all that it "
                "changes as one commit, or name a pull request that was rebased",
            )
        commits = git("rev-list", "--reverse", "--topo-order", span).stdout.split()
        if not commits:
            raise FleetError(
                f"Pull request {pull.number} adds nothing: the ref already contains it",
                expected="commits that the ref lacks",
                found="none",
                remedy="remove it from release_pull_requests",
            )
        return commits

    def _squashed(self, base: str, pull: PullRequest) -> str:
        """Make one commit of all that a pull request changes since ``base``."""
        git = self.repository.git
        made = git(
            *("commit-tree", f"{pull.head}^{{tree}}", "-p", base),
            input_text=f"Pull request {pull.number} at {pull.head}\n",
        )
        return made.stdout.strip()

    def _pick(
        self, tree: Path, commit: str, pull: PullRequest, recorded: Mapping[str, Recorded]
    ) -> list[Join]:
        git = self.repository.git
        self._refuse_links(commit, pull)
        done = git(
            "cherry-pick",
            "-x",
            "--allow-empty",
            "--keep-redundant-commits",
            commit,
            cwd=tree,
            check=False,
        )
        if done.rc == 0:
            return []
        unmerged = _unmerged(git("ls-files", "-u", "-z", cwd=tree).stdout)
        if not unmerged:
            raise FleetError(
                f"Commit {commit} of pull request {pull.number} cannot be applied",
                found=done.stderr.strip()[-500:],
                remedy="name a rebased pull request",
            )
        joins: list[Join] = []
        refused: list[FleetError] = []
        for path, stages in unmerged.items():
            if _is_dropped(path, pull):
                git("rm", "--quiet", "--force", "--cached", "--", path, cwd=tree)
                if 2 in stages:
                    git("checkout", "HEAD", "--", path, cwd=tree)
                else:
                    (tree / path).unlink(missing_ok=True)
                continue
            try:
                if path in recorded:
                    joins.append(self._apply_recorded(tree, recorded[path]))
                else:
                    joins += self._resolve(tree, path, stages, pull)
            except FleetError as error:
                refused.append(error)
        if refused:
            raise _refuse_all(refused)
        git("-c", "core.editor=true", "cherry-pick", "--continue", cwd=tree)
        return joins

    def _refuse_links(self, commit: str, pull: PullRequest) -> None:
        """Refuse a commit that makes a link: what writes or copies a file would follow it."""
        listing = self.repository.git(
            *("diff-tree", "-r", "--root", "--no-commit-id", "--no-renames", "-z", commit)
        ).stdout
        fields = listing.split("\0")
        links = [
            path
            for row, path in zip(fields[::2], fields[1::2])
            if row.split(" ")[1] in _LINKS and not _is_dropped(path, pull)
        ]
        if links:
            raise FleetError(
                f"Commit {commit} of pull request {pull.number} makes a link of a file",
                expected="regular files",
                found=", ".join(links[:5]),
                remedy="name a pull request without links, or add these paths to its drop",
            )

    def _resolve(
        self, tree: Path, path: str, stages: set[int], pull: PullRequest
    ) -> tuple[Join, ...]:
        """Join the conflicts of one file by the rules, and tell git so."""
        git = self.repository.git
        if stages != {1, 2, 3}:
            raise FleetError(
                f"{path} was added, removed or renamed on one side only",
                expected="a file that the ancestor, the ref and the pull request have",
                found=_describe_stages(stages),
                remedy=f"add {path} to drop of pull request {pull.number} if it is not "
                "needed, or name a rebased pull request",
            )
        texts = [git("cat-file", "blob", f":{stage}:{path}", cwd=tree) for stage in (1, 2, 3)]
        base, ours, theirs = (_require_text(text.stdout, path) for text in texts)
        left = _count_conflicts((tree / path).read_bytes())
        resolution = self.resolver.resolve(
            path, Versions(base, ours, theirs, left), self.repository.merge
        )
        (tree / path).write_bytes(resolution.text.encode())
        git("add", "--", path, cwd=tree)
        return resolution.joins

    def _apply_recorded(self, tree: Path, recorded: Recorded) -> Join:
        """Put the recorded text of one file in the place of its conflicts."""
        git = self.repository.git
        path = recorded.path
        left = _count_conflicts((tree / path).read_bytes())
        git("checkout", "HEAD", "--", path, cwd=tree)
        blob = git("rev-parse", f"HEAD:{path}", cwd=tree).stdout.strip()
        # Plain apply wants every line of context; the blob says that it is the same file.
        done = git("apply", "--index", "-", cwd=tree, input_text=recorded.patch, check=False)
        if blob != recorded.blob or done.rc != 0:
            raise FleetError(
                f"The recorded resolution of {path} in {recorded.source} does not fit",
                expected=f"a patch of the text {recorded.blob}",
                found=f"the text {blob} {done.stderr.strip()[:300]}".strip(),
                remedy="resolve the conflict again and record it with git diff --full-index",
            )
        return Join(path, RECORDED, 1, left)

    def _drop(self, tree: Path, before: str, pull: PullRequest) -> list[str]:
        git = self.repository.git
        touched = self.repository.changed(before, self._head(tree))
        paths = [path for path in touched if _is_dropped(path, pull)]
        for path in paths:
            known = git("cat-file", "-e", f"{before}:{path}", check=False).rc == 0
            if known:
                git("checkout", before, "--", path, cwd=tree)
            else:
                git("rm", "--quiet", "--", path, cwd=tree)
        if paths:
            git(
                "commit",
                "--quiet",
                "--message",
                f"Drop from pull request {pull.number}: {', '.join(paths)}",
                cwd=tree,
            )
        return paths

    def _correct(self, tree: Path, ref: str, pull: PullRequest) -> list[Correction]:
        """Commit the corrections of a pull request, each from one exact text to another."""
        git = self.repository.git
        found = fitting_corrections(self.corrections, ref, pull.head)
        for correction in found:
            for change in correction.changes:
                file = tree / change.path
                content = file.read_bytes() if file.is_file() else b""
                file.write_bytes(correct(correction, change, content))
                git("add", "--", change.path, cwd=tree)
            git("commit", "--quiet", "--message", f"Correct: {correction.reason}", cwd=tree)
        return found

    def _text(self, commit: str, path: str) -> str | None:
        shown = self.repository.git("cat-file", "blob", f"{commit}:{path}", check=False)
        return shown.stdout if shown.rc == 0 else None

    def _versions(
        self, base: str, pull: PullRequest, before: str, tree: Path
    ) -> list[FileVersions]:
        after = self._head(tree)
        paths = set(self.repository.changed(base, pull.head)) | set(
            self.repository.changed(before, after)
        )
        return [
            self._versions_of(path, base, pull, before, after)
            for path in sorted(paths)
            if not _is_dropped(path, pull)
        ]

    def _versions_of(
        self, path: str, base: str, pull: PullRequest, before: str, after: str
    ) -> FileVersions:
        texts = [self._text(commit, path) for commit in (before, base, pull.head, after)]
        return FileVersions(path, pull.number, *texts)


def _refuse_all(refused: Sequence[FleetError]) -> FleetError:
    """Make one report of all files that no rule takes."""
    if len(refused) == 1:
        return refused[0]
    conflicts = [each for error in refused for each in error.details.get("conflicts", [])]
    return FleetError(
        f"{len(refused)} files conflict in ways that no rule knows: "
        + "; ".join(error.message for error in refused),
        expected=refused[0].expected,
        found="\n".join(error.found for error in refused),
        remedy=refused[0].remedy,
        details={"conflicts": conflicts},
    )


def _require_used(recorded: Mapping[str, Recorded], joins: Sequence[Join]) -> None:
    used = {join.path for join in joins if join.rule == RECORDED}
    unused = [each for path, each in recorded.items() if path not in used]
    if unused:
        raise FleetError(
            "A recorded resolution is for a file that does not conflict",
            expected="a conflict in every file of it",
            found=", ".join(f"{each.path} in {each.source}" for each in unused),
            remedy="remove these files from the recorded resolution",
        )


def _is_dropped(path: str, pull: PullRequest) -> bool:
    return any(path == drop or path.startswith(drop.rstrip("/") + "/") for drop in pull.drop)


def _unmerged(listing: str) -> dict[str, set[int]]:
    found: dict[str, set[int]] = {}
    for row in listing.split("\0"):
        if row:
            head, path = row.split("\t", 1)
            found.setdefault(path, set()).add(int(head.split()[2]))
    return found


def _describe_stages(stages: set[int]) -> str:
    names = {1: "the common ancestor", 2: "the ref", 3: "the pull request"}
    return "only in " + " and ".join(names[stage] for stage in sorted(stages))


def _count_conflicts(text: bytes) -> int:
    return text.count(b"\n" + b"=" * MARKER_SIZE + b"\n")


def _require_text(text: str, path: str) -> str:
    # The runner replaces what is not UTF-8.
    if "\ufffd" in text or "\0" in text:
        raise FleetError(
            f"{path} conflicts and is not text",
            expected="UTF-8",
            found="other bytes",
            remedy="drop it from the pull request or name a rebased one",
        )
    return text


def _export(tree: Path, changed: Sequence[str], dest: Path) -> None:
    """Copy the changed files below ``dest``, whole or not at all."""
    scratch = dest.with_name(f".{dest.name}.new")
    for folder in (scratch, dest):
        shutil.rmtree(folder, ignore_errors=True)
    scratch.mkdir(parents=True)
    for path in changed:
        if (tree / path).is_file() and not (tree / path).is_symlink():
            target = scratch / path
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(tree / path, target)
    scratch.rename(dest)
