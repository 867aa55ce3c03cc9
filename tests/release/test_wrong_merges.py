# SPDX-License-Identifier: Apache-2.0
"""Every way to get a conflict wrong that a slip of the hand can make is caught.

In the places where git left conflicts, one line at a time of the right result is lost, doubled,
moved or indented anew; the checks must see each.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from difflib import SequenceMatcher
from pathlib import Path

import pytest
from glm_fleet.core.runner import run_program
from glm_fleet.release.compiler import Compiler
from glm_fleet.release.conflict import Common, parse_segments
from glm_fleet.release.git import Repository
from glm_fleet.release.merge import Resolver
from glm_fleet.release.verify.model import FileVersions, SourceExpectations
from glm_fleet.release.verify.tree import verify_tree

from . import standin
from .conftest import Upstream
from .test_releases import CUDA, INDEXER, compile_release

pytestmark = pytest.mark.release

WRONG = 20


def places(after: str, merged: str) -> Iterator[tuple[int, int]]:
    """Yield the lines (first, end) of the result that git did not merge by itself."""
    merged_alone = [
        line
        for segment in parse_segments(merged)
        for line in (segment.lines if isinstance(segment, Common) else ["a conflict\n"])
    ]
    matcher = SequenceMatcher(None, after.splitlines(keepends=True), merged_alone, autojunk=False)
    for tag, first, end, _, _ in matcher.get_opcodes():
        if tag in ("replace", "delete"):
            yield first, end


def slips(after: str, merged: str) -> Iterator[tuple[str, str]]:
    """Yield (what was done, the text) of every slip in the conflicts of a file."""
    lines = after.splitlines(keepends=True)
    for first, end in places(after, merged):
        for at in range(first, end):
            line = lines[at]
            if not line.strip() or line.strip().startswith("#"):
                continue
            before, rest = lines[:at], lines[at + 1 :]
            said = f"line {at + 1}: {line.strip()}"
            yield f"lost, {said}", "".join([*before, *rest])
            yield f"doubled, {said}", "".join([*before, line, line, *rest])
            yield f"indented, {said}", "".join([*before, f"    {line}", *rest])
            # Beside a blank line a line has not moved.
            if at + 1 < end and lines[at + 1].strip() and lines[at + 1] != line:
                yield f"moved down, {said}", "".join([*before, rest[0], line, *rest[1:]])
            if at > first and lines[first] != line:
                moved = [*lines[:first], line, *lines[first:at], *rest]
                yield f"moved to the top, {said}", "".join(moved)


def failed(
    upstream: Upstream, compiler: Compiler, version: str, folder: Path, texts: dict[str, str]
) -> set[str]:
    """Name the checks that a result does not pass, but for the tree that is not all there."""

    def show(ref: str, path: str) -> str:
        return upstream.git("cat-file", "blob", f"{ref}:{path}", check=False) + "\n"

    before = {path: show(f"v{version}", path) for path in texts}
    versions = [
        FileVersions(
            path, 1, before[path], show(f"v{standin.BASE}", path), show(upstream.head, path), text
        )
        for path, text in texts.items()
    ]
    for path, text in texts.items():
        (folder / path).write_text(text)
    checks = verify_tree(
        folder,
        changed=tuple(texts),
        before=before,
        versions=versions,
        expectations=SourceExpectations(),
        merge=compiler.repository.merge,
    )
    return {check.name for check in checks if not check.passed} - {"vllm_imports_exist"}


@pytest.mark.parametrize("version", ["0.24.0", "0.27.1"])
def test_every_slip_in_a_conflict_is_caught(
    upstream: Upstream, tmp_path: Path, version: str
) -> None:
    patched, folder = compile_release(upstream, tmp_path, version)
    repository = Repository(f"file://{upstream.path}", tmp_path / "cache", run_program)
    compiler = Compiler(repository, Resolver(), SourceExpectations())
    right = {
        path: (folder / path).read_text() for path in (INDEXER, CUDA) if path in patched.changed
    }
    assert failed(upstream, compiler, version, folder, right) == set()
    wrong = []
    for path, text in right.items():
        git = ["merge-tree", "--write-tree", "--name-only", f"v{version}", upstream.head]
        tree = upstream.git(*git, check=False).splitlines()[0]
        merged = upstream.git("cat-file", "blob", f"{tree}:{path}") + "\n"
        wrong += [(path, said, slip) for said, slip in slips(text, resized(merged))]
    assert len(wrong) > WRONG
    # The same ones each time, spread over all places.
    for path, said, slip in random.Random(16).sample(wrong, WRONG):  # noqa: S311 - no secret
        found = failed(upstream, compiler, version, folder, {**right, path: slip})
        assert found, f"{version}, {path}: {said}"


def resized(merged: str) -> str:
    """Give git's markers the length that the compiler asks git for."""
    return "".join(
        line[0] * 24 + line if line[:7] in ("<" * 7, "=" * 7, ">" * 7, "|" * 7) else line
        for line in merged.splitlines(keepends=True)
    )
