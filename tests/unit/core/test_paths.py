# SPDX-License-Identifier: Apache-2.0
"""Names from outside stay in their folder, or are no names."""

from __future__ import annotations

import pytest
from glm_fleet.artifact.manifest import FileEntry, Manifest, artifact_id, parse_manifest
from glm_fleet.core.errors import FleetError
from glm_fleet.core.paths import file_name, relative_path
from glm_fleet.release.download import wheel_name

DIGEST = "0" * 64


@pytest.mark.parametrize(
    "text", ["a", "a/b.json", "vllm/_C.abi3.so", "a b/ä.txt", "..a/b..", "a" * 200]
)
def test_plain_paths_are_taken_as_they_are(text: str) -> None:
    assert relative_path(text, "It") == text
    assert FileEntry(text, 0, DIGEST).path == text


@pytest.mark.parametrize(
    "text",
    ["", "/", "/etc/passwd", "..", "../x", "a/../b", "a/..", ".", "./a", "a/./b", "a//b", "a/",
     "a\\b", "..\\x", "a\0b", "a\nb", "\x1b[2J", "a\u202eb", "\ud800", "a" * 201, "a/" * 600],
)  # fmt: skip
def test_anything_else_is_refused_where_it_becomes_an_object(text: str) -> None:
    with pytest.raises(FleetError, match="It names a file"):
        relative_path(text, "It")
    with pytest.raises(FleetError):
        FileEntry(text, 0, DIGEST)


def test_a_name_is_no_path() -> None:
    assert wheel_name("https://x/y/a%2Bb-1-py3-none-any.whl?z#sha256=1") == "a+b-1-py3-none-any.whl"
    for url in ("https://x/y/", "https://x/..%2f..%2fetc%2fpasswd", "https://x/%2e%2e"):
        with pytest.raises(FleetError):
            wheel_name(url)
    with pytest.raises(FleetError, match="another folder"):
        file_name("a/b", "It")


@pytest.mark.parametrize("names", [["a", "a"], ["a", "a/b"], ["a/b/c", "a/b"]])
def test_files_do_not_lie_in_each_others_place(names: list[str]) -> None:
    files = tuple(FileEntry(name, 1, DIGEST) for name in names)
    data = Manifest("model", artifact_id("m", files), files, {}).as_dict()
    with pytest.raises(FleetError, match="a file twice"):
        parse_manifest(data)


@pytest.mark.parametrize("wrong", [{"size": -1}, {"sha256": "x"}, {"root": "../x"}, {"sha256": ""}])
def test_sizes_and_digests_are_those_of_a_file(wrong: dict[str, object]) -> None:
    with pytest.raises(FleetError, match="cannot be"):
        FileEntry(**{"path": "a", "size": 1, "sha256": DIGEST, **wrong})  # type: ignore[arg-type]
