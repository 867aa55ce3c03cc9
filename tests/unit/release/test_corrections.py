# SPDX-License-Identifier: Apache-2.0
"""Corrections fit one exact text; a known fault without one is refused."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path
from typing import Any

import pytest
from glm_fleet.core.errors import FleetError
from glm_fleet.core.runner import run_program
from glm_fleet.release.compiler import Compiler, Patched
from glm_fleet.release.corrections import (
    Change,
    Correction,
    Fault,
    correct,
    read_correction,
    refuse_faults,
)
from glm_fleet.release.git import PullRequest
from glm_fleet.release.merge import Resolver
from test_compiler import (
    EXPECT,
    KERNELS,
    PULL_FILES,
    Upstream,
    first_upstream,
    repository,
    upstream,
)

from lab import standin
from tests.defaults import defaults

__all__ = ["first_upstream", "upstream"]
ROLE = Path(__file__).resolve().parents[3] / "roles/release"
DEFAULTS = defaults("release")
HEAD = DEFAULTS["release_pull_requests"][0]["head"]
KERNEL = PULL_FILES[KERNELS]
MENDED = KERNEL.replace("return k\n", "return k.clone()\n") + "\n\n# No more.\n"


def patch_of(before: str, after: str, folder: Path, path: str = KERNELS) -> str:
    """Let git write the patch, as an author would."""
    file = folder / path
    file.parent.mkdir(parents=True)
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@t"]
    subprocess.run([*git, "init", "--quiet"], cwd=folder, check=True)
    file.write_text(before)
    subprocess.run([*git, "add", "--all"], cwd=folder, check=True)
    file.write_text(after)
    diff = [*git, "diff", "--unified=0", "--full-index"]
    return subprocess.run(diff, cwd=folder, check=True, capture_output=True, text=True).stdout


def write(head: str, patch: str, *headers: str) -> str:
    lines = [f"Head: {head}", "Mends: a-fault", "Reason: It was wrong.", *headers]
    return "\n".join(lines) + f"\n\n{patch}"


def read(text: str) -> Correction:
    return read_correction("x.patch", text, hashlib.sha256(text.encode()).hexdigest())


def build(upstream: Upstream, tmp_path: Path, *corrections: Correction) -> Patched:
    repo = repository(upstream, tmp_path)
    pulls = [PullRequest(38476, upstream.head, ("csrc",))]
    resolved = repo.resolve("main", pulls)
    repo.fetch(resolved, pulls)
    compiler = Compiler(repo, Resolver(), EXPECT, corrections=corrections)
    return compiler.build(resolved, pulls, dest=tmp_path / "patch")


def test_a_correction_is_built_in_and_told(upstream: Upstream, tmp_path: Path) -> None:
    correction = read(write(upstream.head, patch_of(KERNEL, MENDED, tmp_path / "author")))
    patched = build(upstream, tmp_path, correction)
    assert (tmp_path / "patch" / KERNELS).read_text() == MENDED
    (told,) = patched.report()["corrections"]
    assert told["reason"] == "It was wrong."
    assert told["mends"] == ["a-fault"]
    assert told["files"] == [KERNELS]
    assert "corrected_as_pinned" in [check.name for check in patched.checks]
    assert len(patched.checks) == 13


def test_a_correction_of_another_head_is_left_alone(upstream: Upstream, tmp_path: Path) -> None:
    patch = patch_of(KERNEL, MENDED, tmp_path / "author")
    other_ref = write(upstream.head, patch, f"Ref: {'2' * 40}")
    patched = build(upstream, tmp_path, read(write("1" * 40, patch)), read(other_ref))
    assert (tmp_path / "patch" / KERNELS).read_text() == KERNEL
    assert patched.corrections == ()
    assert len(patched.checks) == 12


def test_a_correction_of_another_text_is_refused(upstream: Upstream, tmp_path: Path) -> None:
    patch = patch_of(KERNEL.replace("q, k", "q, key"), MENDED, tmp_path / "author")
    with pytest.raises(FleetError, match=f"x.patch does not fit {KERNELS}"):
        build(upstream, tmp_path, read(write(upstream.head, patch)))
    assert not (tmp_path / "patch").exists()


def test_a_corrected_result_is_verified_like_any_other(upstream: Upstream, tmp_path: Path) -> None:
    wrong = KERNEL.replace("return k", "return no_such_name")
    patch = patch_of(KERNEL, wrong, tmp_path / "author")
    with pytest.raises(FleetError, match=r"no_undefined_names: .*no_such_name"):
        build(upstream, tmp_path, read(write(upstream.head, patch)))


def test_another_text_than_the_pinned_is_refused() -> None:
    with pytest.raises(FleetError, match="another text than the one that was pinned"):
        read_correction("x.patch", "Head: 1\n", "0" * 64)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda text: text.replace("Head: ", "Hed: "), "not one line 'Head:'"),
        (lambda text: text.replace("Reason: ", "Why: "), "one 'Reason:'"),
        (lambda text: text.replace("Head: 1", "Head: x"), "not a full SHA"),
        (lambda text: text[: text.index("diff --git")], "no patch"),
        (lambda text: text.replace("index ", "index 12..34 "), "without two full blob ids"),
    ],
)
def test_what_is_not_a_correction(change: Any, reason: str, tmp_path: Path) -> None:
    text = write("1" * 40, patch_of(KERNEL, MENDED, tmp_path / "author"))
    with pytest.raises(FleetError, match=reason):
        read(change(text))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda patch: patch.replace("-    return k", "-    return x"), "has another line"),
        (lambda patch: patch.replace("+    return k", "+    return x"), "does not become"),
        (lambda patch: patch.replace("+# No", " # No"), "is not a hunk without context"),
    ],
)
def test_a_hunk_must_say_what_is_there(change: Any, reason: str, tmp_path: Path) -> None:
    correction = read(write("1" * 40, change(patch_of(KERNEL, MENDED, tmp_path / "author"))))
    with pytest.raises(FleetError, match=reason):
        correct(correction, correction.changes[0], KERNEL.encode())


@pytest.mark.parametrize("place", range(6))
def test_every_place_of_a_file_can_be_changed(place: int, tmp_path: Path) -> None:
    before = "".join(f"line {number}\n" for number in range(6))
    for name, after in {
        "added": before.replace(f"line {place}\n", f"line {place}\nnew\n"),
        "removed": before.replace(f"line {place}\n", ""),
        "first": "new\n" + before,
        "replaced": before.replace(f"line {place}\n", "a\nb\n"),
    }.items():
        correction = read(write("1" * 40, patch_of(before, after, tmp_path / name)))
        assert correct(correction, correction.changes[0], before.encode()).decode() == after


# -- what is shipped -----------------------------------------------------------------------
def shipped() -> list[Correction]:
    folder = ROLE / "files/corrections"
    return [
        read_correction(each["file"], (folder / each["file"]).read_text(), each["sha256"])
        for each in DEFAULTS["release_patches"]
    ]


def test_the_shipped_corrections_are_the_pinned_ones_and_all_are_pinned() -> None:
    assert {each.name for each in shipped()} == {
        path.name for path in (ROLE / "files/corrections").iterdir()
    }
    assert [each.head for each in shipped()] == [HEAD]


def refuse(
    corrections: list[Correction], ref: str = "v0.24.0", cc: str = "8.0", *accept: str
) -> list[str]:
    faults = [Fault.read(each) for each in DEFAULTS["release_known_faults"]]
    left = refuse_faults(
        faults,
        corrections,
        ref=ref,
        sha="5" * 40,
        heads=[HEAD],
        capabilities=[cc],
        accepted=accept,
    )
    return [fault.name for fault in left]


def test_the_default_recipe_has_no_known_fault() -> None:
    assert DEFAULTS["release_accept_faults"] == []
    ref = DEFAULTS["release_ref"]
    assert refuse(shipped(), ref, DEFAULTS["release_compute_capabilities"][0]) == []


def test_the_head_without_its_correction_is_refused() -> None:
    with pytest.raises(FleetError, match="has 2 known fault") as caught:
        refuse([])
    assert "overwrite the first ones of the next" in caught.value.found
    assert "release_patches" in caught.value.remedy
    assert "release_accept_faults: [logits-past-the-row, " in caught.value.remedy
    names = ["logits-past-the-row", "lengths-of-two-dimensions"]
    assert refuse([], "v0.24.0", "8.0", *names) == names


@pytest.mark.parametrize("ref", ["v0.25.1", "v0.26.0", "v0.27.1", "v0.28.0", "v0.29.0"])
def test_a_release_with_a_kernel_of_float8_is_refused_before_it_is_built(ref: str) -> None:
    with pytest.raises(FleetError, match="float8-kernel-of-the-indexer") as caught:
        refuse(shipped(), ref)
    assert "does not compile for these GPUs" in caught.value.found
    assert "Name v0.23.0 or v0.24.0 as release_ref" in caught.value.remedy


def test_a_fault_of_some_releases_and_gpus() -> None:
    assert refuse(shipped(), "v0.26.0", "9.0") == []
    assert refuse(shipped(), "v0.26.0", "8.0", "float8-kernel-of-the-indexer")


def test_a_misspelt_fault_is_not_accepted() -> None:
    with pytest.raises(FleetError, match="No known fault is called no-such-fault"):
        refuse(shipped(), "v0.24.0", "8.0", "no-such-fault")


def test_the_labs_correction_fits_its_stand_in() -> None:
    correction = read(standin.correction("1" * 40))
    (change,) = correction.changes
    before = (standin.FILES / standin.NEW_FILES[change.path]).read_bytes()
    assert correct(correction, change, before).decode().count(standin.RIGHT) == 1
    assert isinstance(change, Change)
    assert correction.mends == (standin.FAULT,)


def test_git_applies_the_same_patch_alike(tmp_path: Path) -> None:
    """What we apply is what git would apply to the same text."""
    before = "".join(f"{number}\n" for number in range(20))
    after = before.replace("7\n", "seven\n").replace("12\n", "12\nmore\n")
    patch = patch_of(before, after, tmp_path / "author")
    (tmp_path / "git" / KERNELS).parent.mkdir(parents=True)
    (tmp_path / "git" / KERNELS).write_text(before)
    apply = ["git", "apply", "--unidiff-zero", "-"]
    run_program(apply, cwd=str(tmp_path / "git"), input_text=patch)
    correction = read(write("1" * 40, patch))
    assert (tmp_path / "git" / KERNELS).read_bytes() == correct(
        correction, correction.changes[0], before.encode()
    )
