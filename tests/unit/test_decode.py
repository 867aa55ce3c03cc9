# SPDX-License-Identifier: Apache-2.0
"""Data from outside becomes typed data, or an error that names the place of what is wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypedDict

import pytest
from glm_fleet.core.decode import Count, Matching, Range, Size, Words, decode, parse, read
from glm_fleet.core.errors import FleetError


class _BoardOptional(TypedDict, total=False):
    heat: float | None


class Board(_BoardOptional):
    index: Count
    state: Literal["on", "off"]


@dataclass(frozen=True)
class Host:
    name: Annotated[str, Matching("[a-z]+[0-9]*", "a host's name")]
    boards: Sequence[Board] = ()
    shares: Mapping[str, Annotated[float, Range(0.0, 1.0)]] = field(default_factory=dict)
    said: Annotated[Words, Size(12)] = ""
    last: Board | dict[str, NoReturn] | None = None
    pair: tuple[int, ...] = ()
    edge: tuple[str, int] = ("", 0)
    rest: Any = None
    up: bool = False


class _Numbered(TypedDict):
    schema: Literal[1]


GOOD: dict[str, Any] = {
    "name": "gpu01",
    "boards": [{"index": 0, "state": "on", "heat": None}, {"index": 1, "state": "off"}],
    "shares": {"a b": 1},
    "said": "hello \udcff",
    "last": {},
    "pair": [1, 2],
    "edge": ["a", 1],
    "rest": {"deep": [1, None, "x"]},
    "up": True,
}


def test_types_are_made_of_plain_data() -> None:
    host = decode(Host, GOOD, what="The answer")

    assert host.boards == [{"index": 0, "state": "on", "heat": None}, {"index": 1, "state": "off"}]
    assert host.shares == {"a b": 1.0}
    assert type(host.shares["a b"]) is float
    assert host.said == "hello ?"
    assert (host.last, host.pair, host.rest) == ({}, (1, 2), {"deep": [1, None, "x"]})


@pytest.mark.parametrize(
    ("change", "expected", "found"),
    [
        ({"name": "GPU 1"}, "name to be a host's name", "'GPU 1'"),
        ({"boards": {}}, "boards to be a list", "an object with nothing in it"),
        (
            {"boards": [{"index": 0, "state": "on"}, {"index": True, "state": "on"}]},
            "boards[1].index to be a whole number",
            "true",
        ),
        (
            {"boards": [{"index": -1, "state": "on"}]},
            "boards[0].index to be a number of 0 or more",
            "-1",
        ),
        ({"boards": [{"index": 1}]}, "boards[0] to be an object with state", "with 'index'"),
        ({"boards": [{"index": 1, "state": "On"}]}, "state to be one of 'on', 'off'", "'On'"),
        ({"shares": {"a b": 1.5}}, "shares['a b'] to be a number of 0 to 1", "1.5"),
        ({"shares": {"a": float("inf")}}, "shares.a to be a finite number", "inf"),
        ({"shares": {"a": 10**400}}, "shares.a to be a finite number", "a number of 1329 bits"),
        ({"pair": [1, 2**64]}, "pair[1] to be a whole number", "a number of 65 bits"),
        ({"edge": ["a", "b"]}, "edge[1] to be a whole number", "'b'"),
        ({"edge": ["a", 1, 2]}, "edge to be a list of 2", "a list of 3"),
        ({"said": "more than twelve"}, "said to be at most 12 long", "'more than twelve'"),
        ({"said": None}, "said to be text", "null"),
        ({"name": "g\ud800"}, "name to be text of whole characters", r"'g\ud800'"),
        ({"last": {"index": 0, "state": 1}}, "last.state to be one of", "1"),
        ({"last": {"index": 0}}, "last to be an object with state", "an object with 'index'"),
        ({"last": []}, "last to be an object or null", "a list of 0"),
        ({"rest": {"a": [float("nan")]}}, "rest.a[0] to be a finite number", "nan"),
        ({"up": 1}, "up to be true or false", "1"),
    ],
)
def test_a_wrong_value_is_named_with_its_place(
    change: dict[str, Any], expected: str, found: str
) -> None:
    with pytest.raises(FleetError) as error:
        decode(Host, {**GOOD, **change}, what="The answer of gpu01", remedy="look at it")

    assert error.value.message == "The answer of gpu01 cannot be used"
    assert expected in error.value.expected
    assert found in error.value.found
    assert error.value.remedy == "look at it"


def test_a_key_that_nobody_knows_is_kept_left_out_or_refused() -> None:
    board = {"index": 0, "state": "on", "more": {"x": 1}}

    assert decode(Board, board, what="It") == board
    assert decode(Host, {"name": "a", "more": 1}, what="It") == Host("a")
    with pytest.raises(FleetError, match="no more than"):
        decode(Host, {"name": "a", "more": 1}, what="It", strict=True)
    with pytest.raises(FleetError, match=r"more\.x to be a finite number"):
        decode(Board, {**board, "more": {"x": float("inf")}}, what="It")


@pytest.mark.parametrize(
    "text", ["", "{", "NaN", '{"a": Infinity}', '{"a": 1e999}', "[" * 100_000, "\x00", b"\xff\xfe"]
)
def test_text_that_is_not_what_it_should_be(text: str | bytes) -> None:
    with pytest.raises(FleetError, match="The note cannot be used"):
        parse(dict[str, float], text, what="The note")


def test_data_that_is_too_deep() -> None:
    deep: Any = 1
    for _ in range(500):
        deep = [deep]

    with pytest.raises(FleetError, match="levels deep"):
        decode(Host, {"name": "a", "rest": deep}, what="It")


def test_a_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "note.json"

    with pytest.raises(FileNotFoundError):
        read(Host, path)
    path.write_text(json.dumps({"name": "gpu01"}))
    assert read(Host, path) == Host("gpu01")
    path.write_text("[]")
    with pytest.raises(FleetError, match=f"The file {path} cannot be used"):
        read(Host, path)
    with pytest.raises(FleetError, match="A file cannot be read"):
        read(Host, tmp_path)


def test_text_of_another_class_is_text() -> None:
    class Tagged(str):
        """As Ansible makes of the text that a module returns."""

        __slots__ = ()

    board = decode(Board, {"index": 0, "state": Tagged("on")}, what="It")

    assert board == {"index": 0, "state": "on"}
    with pytest.raises(FleetError, match="one of 1"):
        decode(_Numbered, {"schema": True}, what="It")
