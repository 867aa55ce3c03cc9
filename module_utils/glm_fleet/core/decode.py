# SPDX-License-Identifier: Apache-2.0
"""Plain data from outside, made into typed data or refused with the place of what is wrong.

What a node, a gateway, a hub or a file says is described once, as a dataclass or a `TypedDict`,
and read by `decode`, `parse` or `read`. The types mean more than to a type checker:

- ``int`` is a whole number and no truth value, ``float`` is a finite number, ``str`` is text that
  can be written to a file. ``None`` is JSON's null, `Any` is any JSON of finite numbers.
- ``Annotated`` narrows a type: by `Range` (numbers), `Size` (characters, items or entries),
  `Matching` (text). `Words` is what a program or a person said: what is no text in it becomes ?.
  `Moment` is an ISO time with its zone.
- ``dict[str, NoReturn]`` is {} alone.
- A key that the type does not have is kept in a `TypedDict` and left out of a dataclass; with
  ``strict`` it is refused. A key may be missing where the type says so (a default, total=False).

Every failure is a `FleetError` that names the wrong value by its path, such as gpu.gpus[3].index.
"""

from __future__ import annotations

import ast
import collections.abc
import functools
import json
import math
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from datetime import datetime
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Callable,
    Literal,
    NoReturn,
    TypeVar,
    Union,
    get_args,
    get_origin,
)

from .errors import FleetError, from_os_error

_MOST_BYTES = 256 * 1024 * 1024
_MOST_CHARACTERS = 1024 * 1024
_MOST_ENTRIES = 4 * 1024 * 1024
# As deep as data from outside may be that no type describes.
_DEEPEST = 32
_SHOWN = 80
_ABSENT = "not there"
# Inodes and devices take all of 64 bits.
_LARGEST = 2**64 - 1

_T = TypeVar("_T")
_Reader = Callable[[Any], Any]


@dataclass(frozen=True)
class Range:
    """The least and the greatest of a number."""

    least: float
    most: float = _LARGEST


@dataclass(frozen=True)
class Size:
    """The most characters of a text, items of a list or entries of an object."""

    most: int


@dataclass(frozen=True)
class Matching:
    """What the whole of a text has to match, and how people call that."""

    pattern: str
    meaning: str


@dataclass(frozen=True)
class _Said:
    """Text of a program or a person: a broken character is no reason to refuse the rest."""


@dataclass(frozen=True)
class _Dated:
    """An ISO time of these centuries with its zone."""


Count = Annotated[int, Range(0)]
Amount = Annotated[float, Range(0.0, 1e18)]
Words = Annotated[str, _Said()]
Moment = Annotated[str, _Dated()]


class _WrongError(Exception):
    """A wrong value; whatever encloses it puts its place before the path."""

    def __init__(self, expected: str, value: Any) -> None:
        super().__init__(expected)
        self.expected = expected
        self.value = value
        self.path: list[str] = []


def decode(kind: type[_T], value: Any, *, what: str, remedy: str = "", strict: bool = False) -> _T:
    """Return plain data as ``kind``; raises `FleetError`.

    ``what`` is how the error calls the data, with its owner: "The answer of gpu01".
    """
    wanted: Any = kind
    try:
        found: _T = _reader(wanted, strict)(value)
    except _WrongError as error:
        place = "".join(error.path).lstrip(".")
        raise FleetError(
            f"{what} cannot be used",
            expected=f"{place + ' to be ' if place else ''}{error.expected}",
            found=_shown(error.value),
            remedy=remedy,
        ) from error
    return found


def parse(
    kind: type[_T], text: str | bytes, *, what: str, remedy: str = "", strict: bool = False
) -> _T:
    """Return JSON as ``kind``; raises `FleetError`."""
    try:
        value = json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise FleetError(
            f"{what} cannot be used", expected="JSON", found=str(error)[:200], remedy=remedy
        ) from error
    return decode(kind, value, what=what, remedy=remedy, strict=strict)


def read(
    kind: type[_T], path: Path, *, what: str = "", remedy: str = "", strict: bool = False
) -> _T:
    """Return a file's JSON as ``kind``.

    Raises `FileNotFoundError` where there is none, and `FleetError` for anything else.
    """
    what = what or f"The file {path}"
    try:
        with path.open("rb") as stream:
            content = stream.read(_MOST_BYTES + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise from_os_error(error) from error
    if len(content) > _MOST_BYTES:
        raise FleetError(
            f"{what} cannot be used",
            expected=f"at most {_MOST_BYTES} bytes",
            found="more",
            remedy=remedy,
        )
    return parse(kind, content, what=what, remedy=remedy, strict=strict)


def _no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number")


def _shown(value: Any) -> str:
    """Show a wrong value in a few words."""
    if value is None:
        return "null"
    if isinstance(value, Mapping):
        keys = ", ".join(repr(key)[:20] for key in list(value)[:5])
        return f"an object with {keys or 'nothing in it'}"[:_SHOWN]
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    if isinstance(value, str):
        return ascii(value) if len(value) <= _SHOWN else f"{value[:_SHOWN]!a}…"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > _LARGEST:
        return f"a number of {value.bit_length()} bits"
    return f"{value!r}"[:_SHOWN].lower() if isinstance(value, bool) else f"{value!r}"[:_SHOWN]


@functools.cache
def _reader(kind: Any, strict: bool) -> _Reader:
    """Return what reads a value of a type; raises `TypeError` for a type that nobody can read."""
    origin = get_origin(kind)
    if origin is Annotated:
        return _narrowed(*get_args(kind), strict=strict)
    if origin is Literal:
        return _one_of(get_args(kind))
    if origin is Union:
        return _either([_reader(each, strict) for each in get_args(kind)])
    if origin in (list, collections.abc.Sequence):
        return _items(_reader(get_args(kind)[0], strict), list)
    if origin is tuple and get_args(kind)[-1] is not Ellipsis:
        return _row([_reader(each, strict) for each in get_args(kind)])
    if origin is tuple:
        return _items(_reader(get_args(kind)[0], strict), tuple)
    if origin in (dict, collections.abc.Mapping):
        return _entries(_reader(get_args(kind)[1], strict))
    if is_dataclass(kind) or (isinstance(kind, type) and hasattr(kind, "__total__")):
        return _members(kind, strict)
    return _SIMPLE[kind]


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise _WrongError("text", value)
    if len(value) > _MOST_CHARACTERS:
        raise _WrongError(f"text of at most {_MOST_CHARACTERS} characters", value)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _WrongError("text of whole characters", value) from error
    return value


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) > _LARGEST:
        raise _WrongError("a whole number", value)
    return value


def _finite(value: Any) -> float:
    if not isinstance(value, bool) and isinstance(value, (int, float)):
        try:
            if math.isfinite(value):
                return float(value)
        except OverflowError:
            pass
    raise _WrongError("a finite number", value)


def _truth(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    raise _WrongError("true or false", value)


def _nothing(value: Any) -> None:
    if value is not None:
        raise _WrongError("null", value)


def _never(value: Any) -> NoReturn:
    raise _WrongError(_ABSENT, value)


def _plain(value: Any, depth: int = 0) -> Any:
    """Read JSON that no type describes."""
    if depth > _DEEPEST:
        raise _WrongError(f"at most {_DEEPEST} levels deep", value)
    if isinstance(value, Mapping):
        return _entries(lambda each: _plain(each, depth + 1))(value)
    if isinstance(value, (list, tuple)):
        return _items(lambda each: _plain(each, depth + 1), list)(value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return _whole(value)
    return _finite(value) if isinstance(value, float) else _cleaned(value)


def _cleaned(value: Any) -> str:
    if isinstance(value, str):
        value = value.encode(errors="replace").decode()
    return _text(value)


_SIMPLE: dict[Any, _Reader] = {
    str: _text,
    int: _whole,
    float: _finite,
    bool: _truth,
    None: _nothing,
    type(None): _nothing,
    NoReturn: _never,
    Any: _plain,
}


def _narrowed(kind: Any, *marks: Any, strict: bool) -> _Reader:
    read_it = _cleaned if _Said() in marks else _reader(kind, strict)
    # Once for each type: a report has a hundred thousand values.
    checks = [check for mark in marks if (check := _check(mark))]

    def narrow(value: Any) -> Any:
        found: Any = read_it(value)
        for check in checks:
            if wrong := check(found):
                raise _WrongError(wrong, value)
        return found

    return narrow


def _check(mark: Any) -> Callable[[Any], str] | None:
    """Return what says how a value should be that a mark forbids, '' for one that it allows."""
    if isinstance(mark, Range):
        least, most = mark.least, mark.most
        wrong = f"a number of {least:g} {'or more' if most == _LARGEST else f'to {most:g}'}"
        return lambda found: "" if least <= found <= most else wrong
    if isinstance(mark, Size):
        longest = mark.most
        return lambda found: "" if len(found) <= longest else f"at most {longest} long"
    if isinstance(mark, _Dated):
        return lambda found: "" if _is_moment(found) else "an ISO time with its zone"
    if isinstance(mark, Matching):
        pattern, meaning = re.compile(mark.pattern), mark.meaning
        return lambda found: "" if pattern.fullmatch(found) else meaning
    return None


def _is_moment(text: str) -> bool:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return False
    return moment.tzinfo is not None and 1970 <= moment.year < 3000


def _one_of(choices: tuple[Any, ...]) -> _Reader:
    def choose(value: Any) -> Any:
        # In Python 1 is True, in JSON it is not. Ansible's text is of a class of its own.
        for each in choices:
            alike = isinstance(value, bool) == isinstance(each, bool)
            if alike and isinstance(value, type(each)) and each == value:
                return each
        raise _WrongError(f"one of {', '.join(map(repr, choices))}", value)

    return choose


def _either(readers: list[_Reader]) -> _Reader:
    def read_any(value: Any) -> Any:
        problems: list[_WrongError] = []
        for each in readers:
            try:
                return each(value)
            except _WrongError as error:
                problems.append(error)
        # Of what must not be there nobody has to hear; of the others, the one that got furthest
        # into the value knows best what is wrong with it.
        told = [each for each in problems if each.expected != _ABSENT] or problems
        closest = max(told, key=lambda each: len(each.path))
        if not closest.path:
            words = dict.fromkeys(each.expected for each in told)
            raise _WrongError(" or ".join(words), value)
        raise closest

    return read_any


def _items(read_item: _Reader, make: Callable[[Iterable[Any]], Any]) -> _Reader:
    def read_all(value: Any) -> Any:
        if not isinstance(value, (list, tuple)):
            raise _WrongError("a list", value)
        if len(value) > _MOST_ENTRIES:
            raise _WrongError(f"a list of at most {_MOST_ENTRIES}", value)
        return make(_at(number, read_item, each) for number, each in enumerate(value))

    return read_all


def _row(readers: list[_Reader]) -> _Reader:
    def read_all(value: Any) -> Any:
        if not isinstance(value, (list, tuple)) or len(value) != len(readers):
            raise _WrongError(f"a list of {len(readers)}", value)
        return tuple(_at(number, *each) for number, each in enumerate(zip(readers, value)))

    return read_all


def _entries(read_value: _Reader) -> _Reader:
    def read_all(value: Any) -> dict[str, Any]:
        _check_object(value)
        return {_text(key): _at(key, read_value, each) for key, each in value.items()}

    return read_all


def _check_object(value: Any) -> None:
    if not isinstance(value, Mapping):
        raise _WrongError("an object", value)
    if len(value) > _MOST_ENTRIES:
        raise _WrongError(f"an object of at most {_MOST_ENTRIES} entries", value)


def _at(place: str | int, read_value: _Reader, value: Any) -> Any:
    try:
        return read_value(value)
    except _WrongError as error:
        word = isinstance(place, str) and place.isidentifier()
        error.path.insert(0, f".{place}" if word else f"[{ascii(place)[:_SHOWN]}]")
        raise


def _members(kind: Any, strict: bool) -> _Reader:
    """Return what reads the members of a dataclass or a `TypedDict`."""
    names = vars(sys.modules[kind.__module__])
    if is_dataclass(kind):
        mine = [each for each in fields(kind) if each.init]
        types = {each.name: each.type for each in mine}
        required = {
            each.name
            for each in mine
            if each.default is MISSING and each.default_factory is MISSING
        }
    else:
        types, required = dict(kind.__annotations__), set(kind.__required_keys__)
    readers = {name: _reader(_evaluated(each, names), strict) for name, each in types.items()}

    def read_all(value: Any) -> Any:
        _check_object(value)
        found = {}
        for key, each in value.items():
            if key in readers:
                found[key] = _at(key, readers[key], each)
            elif strict:
                raise _WrongError(f"an object with no more than {', '.join(readers)}", value)
            elif not is_dataclass(kind):
                found[_text(key)] = _at(key, _plain, each)
        missing = required - set(found)
        if missing:
            raise _WrongError(f"an object with {', '.join(sorted(missing))}", value)
        return kind(**found)

    return read_all


class _Unions(ast.NodeTransformer):
    """Writes X | Y as Union[X, Y], because Python 3.9 has no | between types."""

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        if not isinstance(node.op, ast.BitOr):
            return node
        pair = ast.Tuple([self.visit(node.left), self.visit(node.right)], ast.Load())
        return ast.Subscript(ast.Name("Union", ast.Load()), pair, ast.Load())


def _evaluated(annotation: Any, names: Mapping[str, Any]) -> Any:
    """Return the type that an annotation of our own source names."""
    text = getattr(annotation, "__forward_arg__", annotation)
    if not isinstance(text, str):
        return text
    tree = ast.fix_missing_locations(_Unions().visit(ast.parse(text, mode="eval")))
    return eval(compile(tree, text, "eval"), {**names, "Union": Union})  # noqa: S307 - our source
