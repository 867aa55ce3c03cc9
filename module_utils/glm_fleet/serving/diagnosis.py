# SPDX-License-Identifier: Apache-2.0
"""Why a start died, as its journal tells it.

A crash is told many times: by the process that met it, by those that lost it, and by each that
waited for them, and the journal of a unit holds the starts before as well. What explains the
rest is the first cause of the last start that has one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .signatures import EFFECT, SIGNATURES, Signature

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
# What the journal puts before each line where it was not asked for the words alone.
_SYSLOG = re.compile(r"^[A-Z][a-z]{2} +\d+ [\d:]{8} \S+ [^\s\[]+\[\d+\]: ")
# What vLLM puts before each line: the process, and where it logs, level, time and place.
_PROCESS = re.compile(r"^\((?P<name>[A-Za-z]\w*)(?: rank=(?P<rank>\d+))? pid=(?P<pid>\d+)\) ?")
_LEVEL = re.compile(
    r"^(?P<level>DEBUG|INFO|WARNING|ERROR|CRITICAL) [\d-]+ [\d:]+ \[[^\]]*\](?: |$)"
)
_BY_TORCH = re.compile(r"^\[rank(?P<rank>\d+)\]: ?")
_RANKS = re.compile(r"_TP(\d+)|\[rank(\d+)\]|^\S+:\d+:\d+ \[(\d+)\] ")
_EXCEPTION = re.compile(r"^(?:\[rank\d+\]:\s?)?(?:[\w.]*\.)?[A-Z]\w*(?:Error|Exception)(?:: |$)")
# A start begins with a word of systemd or of the server.
_BEGINS = re.compile(
    r"^Start(?:ing|ed) \S+\.service|Scheduled restart job, restart counter"
    r"|vLLM (?:API )?server version|\bnon-default args: "
)
_ENDED = re.compile(r"^RuntimeError: Engine core initialization failed")
_MADE_PROGRESS = re.compile(
    r"Loading weights took|Model loading took|KV cache size:|Capturing CUDA graphs"
    r"|Graph capturing finished|init engine .* took|Application startup complete"
)
_ANY_START_IS_UP = re.compile(r"Application startup complete|Starting vLLM server on")
# A request in the words of the web server, which some releases log without the process.
_ACCESS = re.compile(r'^[A-Z]+: +\S+ - "')
_SAID = 240


@dataclass(frozen=True)
class _Line:
    """A line of the journal, taken apart. ``process`` is (name, pid), ('', '') without one."""

    raw: str
    text: str
    process: tuple[str, str]
    level: str
    rank: str

    @property
    def is_frame(self) -> bool:
        """Tell whether it belongs to a traceback: code, not what was said."""
        return self.text.startswith(("  File ", "    ", "Traceback (")) or "^^^" in self.text


@dataclass(frozen=True)
class Diagnosis:
    """What explains a crash: the line, whose it is ("" or "rank 3"), and what is known of it."""

    said: str
    of: str
    signature: Signature

    @property
    def remedy(self) -> str:
        """Return the way out, with the figures that the line has."""
        found = re.search(self.signature.pattern, self.said)
        groups = found.groupdict(default="") if found else {}
        return self.signature.remedy.format(**groups) if groups else self.signature.remedy

    def __str__(self) -> str:
        said = self.said.strip()
        said = said if len(said) <= _SAID else f"{said[:_SAID].rstrip()}…"
        return f"{said}{f' ({self.of})' if self.of else ''}: {self.remedy}"


_UNKNOWN = Signature(
    "unknown",
    r"^$",
    "no crash that is known here, but the first error of this start: read the journal around it",
    EFFECT,
)


def find_crash(lines: Sequence[str]) -> Diagnosis | None:
    """Return what explains the last start that went wrong; None when nothing says why."""
    for start in reversed(_starts(lines)):
        candidates = list(_candidates(start))
        if candidates:
            # Those of one rank are in the order of time.
            _, best, signature = min(candidates, key=lambda each: (each[2].rank, each[0]))
            return Diagnosis(best.text, f"rank {best.rank}" if best.rank else "", signature)
    return None


def diagnose(lines: Sequence[str]) -> str:
    """Name the crash that the journal shows, with its remedy; '' if it shows none."""
    found = find_crash(lines)
    return str(found) if found else ""


def lower_graphs_help(lines: Sequence[str]) -> bool:
    """Tell whether the journal shows a crash that a lower mode of CUDA graphs avoids."""
    found = find_crash(lines)
    return found is not None and found.signature.graphs


def relevant_lines(lines: Sequence[str], most: int = 12) -> list[str]:
    """Pick the lines a person would look for: the errors of the last start that has some, the
    first of them and the last, else the end of the journal."""
    for start in reversed(_starts(lines)):
        errors = [
            line.raw
            for line in start
            if not line.is_frame
            and line.text.strip()
            and re.search(r"\bERROR\b|Error:|error:|start gate|NCCL WARN", line.raw)
        ]
        if errors:
            head = most - most // 2
            picked = errors if len(errors) <= most else [*errors[:head], *errors[-(most // 2) :]]
            return [line[-300:] for line in picked]
    return [line[-300:] for line in lines[-most:]]


def _fits(signature: Signature, text: str, code: Sequence[str]) -> bool:
    return bool(re.search(signature.pattern, text)) and (
        not signature.within or any(re.search(signature.within, line) for line in code)
    )


def _parse(raw: str) -> _Line:
    """Take a line apart. The text keeps its indentation, which tells code from words."""
    rest, process, rank = _SYSLOG.sub("", _COLOUR.sub("", raw.rstrip())), ("", ""), ""
    match = _PROCESS.match(rest)
    if match:
        process, rank, rest = (
            (match["name"], match["pid"]),
            match["rank"] or "",
            rest[match.end() :],
        )
    level = _LEVEL.match(rest)
    text = rest[level.end() :] if level else rest
    by_torch = _BY_TORCH.match(text)
    if by_torch:
        rank, text = by_torch["rank"], text[by_torch.end() :]
    found = _RANKS.search(process[0]) or _RANKS.search(text)
    if not rank and found:
        rank = next(each for each in found.groups() if each)
    return _Line(raw, text, process, level["level"] if level else "", rank)


def _starts(lines: Sequence[str]) -> list[list[_Line]]:
    """Divide a journal into its starts, oldest first.

    A new one begins where systemd or the server says so, where a process of a name comes back
    under another number, and where the API server speaks after its own end.
    """
    starts: list[list[_Line]] = [[]]
    pids: dict[str, str] = {}
    ended: tuple[str, str] | None = None
    for line in map(_parse, lines):
        name, pid = line.process
        another = bool(name) and pids.get(name, pid) != pid
        speaks_again = ended is not None and line.process == ended and bool(line.level)
        if _BEGINS.search(line.text) or another or speaks_again:
            starts.append([])
            pids, ended = {}, None
        if name:
            pids[name] = pid
        if _ENDED.search(line.text):
            ended = line.process
        starts[-1].append(line)
    return starts


def _candidates(start: Sequence[_Line]) -> Iterator[tuple[int, _Line, Signature]]:
    """Yield (place, line, signature) of what went wrong in a start and was not survived."""
    progress: dict[tuple[str, str], int] = {}
    code: dict[tuple[str, str], list[str]] = {}
    up = -1
    for place, line in enumerate(start):
        if _MADE_PROGRESS.search(line.text) and line.process[0]:
            progress[line.process] = place
        if up < 0 and _ANY_START_IS_UP.search(line.text):
            up = place
        if line.is_frame:
            code.setdefault(line.process, []).append(line.text.rstrip())
    for place, line in enumerate(start):
        if line.is_frame or line.level in ("DEBUG", "INFO", "WARNING"):
            continue
        # Once it is up, the API server repeats words of clients; the engine has words of its own.
        ours = line.process[0].startswith("APIServer") or _ACCESS.search(line.text)
        if 0 <= up < place and ours:
            continue
        # An import that failed and was done without is no crash: the same process went on.
        if place < up or place < progress.get(line.process, -1):
            continue
        known = next(
            (each for each in SIGNATURES if _fits(each, line.text, code.get(line.process, ()))),
            None,
        )
        if known is not None:
            yield place, line, known
        elif _EXCEPTION.search(line.text):
            yield place, line, _UNKNOWN
