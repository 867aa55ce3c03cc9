# SPDX-License-Identifier: Apache-2.0
"""What a tune changes and what it writes: settings as variables, its record, its table.

A setting is named as operators know it: a variable of the role serving, a flag of vLLM, or a
variable of the engine's environment. The best ones become variables of an inventory again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from .. import __version__
from ..core.decode import Moment, Size, Words, parse
from ..core.errors import FleetError
from ..core.format import duration
from ..core.table import Line, render_table, wrap
from ..serving.command import OWN_FLAGS
from ..serving.graphs import LOGITS_PAST_THE_ROW, MODES
from .tuning import Setting, Settings, Try, Value, Verdict, best_of, ratio, verdict

SCHEMA = "glm-fleet/tune/1"
# What a node says of itself, and why it is held, while it is tuned.
REASON = "tuning"
# Variables that decide how fast it runs, and not what is served or where.
VARIABLES = (
    "serving_cuda_graphs",
    "serving_dtype",
    "serving_gpu_memory_utilization",
    "serving_kv_cache_dtype",
    "serving_max_num_seqs",
)
_FLAG = re.compile(r"--[a-z][a-z0-9-]+")
_ENVIRONMENT = re.compile(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)+")
_EXTRA, _VARIABLES = "serving_extra_arguments", "serving_environment"
_Scalar = Union[None, bool, int, float, str]


@dataclass(frozen=True)
class Base:
    """What the inventory gives a node, as far as a tune can change it."""

    variables: Mapping[str, Value]
    extra: Sequence[str]
    environment: Mapping[str, str]


@dataclass(frozen=True)
class Record:
    """A tune as it is kept: what a run that was killed goes on from, and the report.

    ``before`` is the deployment that the node goes back to, ``running`` the one that it was
    switched to last. ``began`` is when the node was taken out of service.
    """

    schema: Literal["glm-fleet/tune/1"]
    node: Words
    state: Literal["running", "done"]
    before: Words
    running: Words
    began: Moment
    load: dict[str, Any]
    settings: dict[str, Annotated[list[_Scalar], Size(64)]]
    tries: Annotated[list[Try], Size(1000)] = field(default_factory=list)
    # Why settings or values of them were not tried.
    left_out: dict[str, Words] = field(default_factory=dict)
    ended: Words = ""


def read_record(path: Path) -> Record | None:
    """Return the record of a tune, None where there is none; raises `FleetError`."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise FleetError("The record of a tune cannot be read", found=f"{path}: {error}") from error
    return parse_record(text, what=str(path))


def parse_record(text: str, *, what: str) -> Record:
    """Return what the text of a record says; raises `FleetError`."""
    return parse(Record, text, what=what)


def goes_on(known: Record | None, current: str) -> bool:
    """Tell whether a tune did not end, and the node still runs what it was switched to then.

    ``current`` is the deployment that was activated there last.
    """
    if known is None or known.state != "running":
        return False
    return current in (known.before, known.running)


def check_node(node: str, *, current: str, active: bool, lost: bool, record: str) -> None:
    """Refuse a node that cannot be tuned, or whose tune began somewhere else.

    ``lost`` says that it is held by a tune whose record is not here.
    """
    if lost:
        raise FleetError(
            f"{node} is held by a tune that this controller knows nothing of",
            expected=f"its record, {record}",
            found="none",
            remedy="run tune.yml on the controller that began it, or rollback.yml and then "
            f"undrain.yml with --limit {node}",
        )
    if not (current and active):
        raise FleetError(
            f"{node} cannot be tuned",
            expected="a node that serves: it is compared with that, and goes back to it",
            found="glm-serving.service does not run" if current else "nothing was deployed",
            remedy="run site.yml first",
        )


def candidates(
    wanted: Mapping[str, Sequence[Value]],
    base: Base,
    *,
    options: Sequence[str],
    faults: Sequence[str],
) -> tuple[list[Setting], dict[str, str]]:
    """Return the settings that can be tried on a release, and why others are left out.

    ``options`` are those of its argument parser, [] where nobody could tell, ``faults`` what it
    is known to have. Raises `FleetError` for a name that is none of a setting.
    """
    settings, left_out = [], {}
    for name, values in wanted.items():
        _check_name(name)
        kept = tuple(values)
        if name.startswith("--") and options and not _is_option(name, options):
            left_out[name] = "this release does not have it"
            continue
        if name == "serving_cuda_graphs":
            unknown = [str(each) for each in kept if each not in MODES]
            if unknown:
                raise FleetError(
                    "A mode of CUDA graphs is unknown",
                    expected=f"tune_settings to have some of {', '.join(MODES)}",
                    found=", ".join(unknown),
                )
            if LOGITS_PAST_THE_ROW in faults:
                kept = tuple(each for each in kept if not MODES[str(each)].vllm.startswith("FULL"))
                left_out[name] = f"full graphs crash with the fault {LOGITS_PAST_THE_ROW}"
        now = value_now(name, base)
        alike = next((each for each in kept if str(each) == str(now)), now)
        if [each for each in kept if each != alike]:
            settings.append(Setting(name, kept, alike))
    return settings, left_out


def value_now(name: str, base: Base) -> Value:
    """Return what the inventory gives a setting, None where it leaves it to vLLM."""
    if name.startswith("--"):
        return _value_of_flag(name, base.extra)
    if name in VARIABLES:
        value = base.variables.get(name)
        return _as_number(value) if isinstance(value, str) else value
    found = base.environment.get(name)
    return None if found in (None, "") else _as_number(str(found))


def variables_for(settings: Settings, base: Base) -> dict[str, Any]:
    """Return the variables of an inventory that give a node these settings."""
    variables: dict[str, Any] = {}
    extra, environment = list(base.extra), dict(base.environment)
    for name, value in settings.items():
        if name in VARIABLES:
            variables[name] = value
        elif name.startswith("--"):
            extra = [*_without(name, extra), *_words(name, value)]
        elif value is None:
            environment.pop(name, None)
        else:
            environment[name] = str(value)
    if extra != list(base.extra):
        variables[_EXTRA] = extra
    if environment != dict(base.environment):
        variables[_VARIABLES] = environment
    return variables


def in_words(settings: Settings) -> str:
    """Name settings on one line."""
    if not settings:
        return "as the inventory has it"
    return ", ".join(
        f"{name.removeprefix('serving_')} {'left to vLLM' if value is None else _plain(value)}"
        for name, value in settings.items()
    )


def try_in_words(one: Try, tries: Sequence[Try]) -> str:
    """Say on one line what came of a try."""
    if one.problem:
        return f"{in_words(one.settings)}: lost: {one.problem}"
    against = ratio(one, tries)
    speed = "measured" if against is None else f"{against:.3f} of the speed before"
    return f"{in_words(one.settings)}: {speed}, {len(one.rates)} measurements"


def inventory_file(record: Record, found: Verdict | None, base: Base) -> str:
    """Return the text of the inventory file with the best settings; {} where nothing was better."""
    heading = [f"# Tuned on {record.node}, {record.began}: {_conclusion(found)}"]
    if found is None or not found.better:
        return "\n".join(["---", *heading, "{}"]) + "\n"
    heading.append(
        "# For nodes with the same GPUs and the same release. To use it: add the file to the"
    )
    heading.append("# group_vars of gpu_nodes, or give it to site.yml with -e @FILE.")
    # JSON is YAML: nothing has to be quoted by hand.
    lines = [
        f"{name}: {json.dumps(value)}"
        for name, value in variables_for(found.settings, base).items()
    ]
    return "\n".join(["---", *heading, *lines]) + "\n"


def report(record: Record, least_gain: float, base: Base) -> dict[str, Any]:
    """Return the record as it is written, with what was best."""
    found = verdict(record.tries, least_gain)
    best = None
    if found:
        best = {**asdict(found), "variables": variables_for(found.settings, base)}
    tries = [
        {**each, "ratio": ratio(one, record.tries)}
        for each, one in zip(asdict(record)["tries"], record.tries)
    ]
    return {**asdict(record), "tries": tries, "made_by": f"glm-fleet {__version__}", "best": best}


def render(record: Record, least_gain: float, width: int) -> list[Line]:
    """Return the table of all tries, and what follows from them."""
    loads = list(dict.fromkeys(load for each in record.tries for one in each.rates for load in one))
    heading = ("try", "settings", "start", *loads, "against before", "lost by")
    found = verdict(record.tries, least_gain)
    best = found.settings if found and found.better else best_of(record.tries)
    rows, tones = [], []
    for number, each in enumerate(record.tries, 1):
        against = ratio(each, record.tries)
        rows.append(
            (
                f"{number} again" if each.confirms else str(number),
                in_words(each.settings),
                duration(each.start_s) if each.started else "ran",
                *(_mean(each, load) for load in loads),
                "-" if against is None else f"{against:.3f}",
                each.problem,
            )
        )
        tones.append("bad" if each.problem else "good" if best and each.settings == best else "")
    lines = render_table(heading, rows, width, tones) if rows else []
    if rows:
        lines.append(
            Line("Tokens a second: of so many streams together, of clients one after another.")
        )
    for name, why in record.left_out.items():
        lines += wrap(f"{name} was not tried, or not with every value: {why}.", width, "warning")
    words = f"{record.node}: {_conclusion(found)}"
    words += f" It ended because {record.ended}." if record.ended else ""
    return [*lines, *wrap(words, width, "good" if found and found.better else "warning")]


def rates_of(result: Mapping[str, Any]) -> dict[str, float]:
    """Return {load: tokens a second} of what ``vllm_bench`` measured; raises `FleetError`."""
    rates = {str(each["streams"]): float(each["output_rate"]) for each in result.get("levels", ())}
    if result.get("clients"):
        rates["clients"] = float(result["clients"]["output_rate"])
    if not rates or min(rates.values()) <= 0:
        raise FleetError(
            "The benchmark gave no figures",
            expected="tokens a second of tune_streams or tune_clients",
            found=f"{rates or 'nothing'}",
        )
    return rates


def _conclusion(found: Verdict | None) -> str:
    if found is None:
        return "nothing could be measured; nothing is to be changed."
    noise = f"(equal ones differ by up to {found.noise:.1%})"
    if found.better:
        return f"{in_words(found.settings)}: {found.gain:.3f} times as fast as before {noise}."
    if not found.settings:
        return f"nothing was faster than the inventory {noise}."
    return (
        f"nothing was surely faster than the inventory; nearest came {in_words(found.settings)} "
        f"with {found.gain:.3f} of its speed {noise}."
    )


def _mean(each: Try, load: str) -> str:
    found = [one[load] for one in each.rates if load in one]
    return f"{sum(found) / len(found):.1f}" if found else "-"


def _check_name(name: str) -> None:
    if name in VARIABLES or _ENVIRONMENT.fullmatch(name):
        return
    if _FLAG.fullmatch(name) and name not in OWN_FLAGS:
        return
    raise FleetError(
        f"tune_settings cannot change {name}",
        expected=f"one of {', '.join(VARIABLES)}, a flag of vLLM that no variable gives, as "
        "--max-num-batched-tokens, or a variable of the environment, as NCCL_ALGO",
        found=name,
    )


def _is_option(name: str, options: Sequence[str]) -> bool:
    return name in options or f"--{name.removeprefix('--no-')}" in options


def _no(flag: str) -> str:
    return f"--no-{flag.removeprefix('--')}"


def _words(flag: str, value: Value) -> list[str]:
    if value is None:
        return []
    if isinstance(value, bool):
        return [flag if value else _no(flag)]
    return [flag, str(value)]


def _without(flag: str, words: Sequence[str]) -> list[str]:
    """Return the words of a command line without a flag and its values."""
    kept, inside = [], False
    for word in words:
        if word.startswith("--"):
            inside = word.partition("=")[0] in (flag, _no(flag))
        if not inside:
            kept.append(word)
    return kept


def _value_of_flag(flag: str, words: Sequence[str]) -> Value:
    values: list[str] | None = None
    for place, word in enumerate(words):
        name, sign, value = word.partition("=")
        if name == _no(flag):
            return False
        if name == flag:
            behind = words[place + 1 : place + 2]
            values = [value] if sign else [each for each in behind if not each.startswith("--")]
    if values is None:
        return None
    return _as_number(values[0]) if values else True


def _as_number(text: str) -> Value:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _plain(value: Value) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)
