# SPDX-License-Identifier: Apache-2.0
"""Whatever comes from outside is read, or refused with a `FleetError`: nothing else, and no loop.

Bounded and the same on every run: what is tried is chosen by position, or by Hypothesis without
a random seed.
"""

from __future__ import annotations

import contextlib
import copy
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

import pytest
from glm_fleet.core.decode import decode
from glm_fleet.core.errors import FleetError
from glm_fleet.core.http import Http
from glm_fleet.core.runner import Runner, RunResult
from glm_fleet.core.systemd import unit_state
from glm_fleet.health.exposition import exposition
from glm_fleet.health.html import render_page, view
from glm_fleet.health.judge import judge_fleet
from glm_fleet.health.notify import find_events
from glm_fleet.health.preflight import judge_hosts
from glm_fleet.health.tables import health_json, preflight_json, render_health, render_preflight
from glm_fleet.health.verdict import Limits
from glm_fleet.node.answer import decode_facts
from glm_fleet.node.gpu import read_gpus
from glm_fleet.node.readiness import answer as readiness_answer
from glm_fleet.node.watchdog import Flag, Watchdog
from glm_fleet.node.watchdog import Settings as WatchSettings
from glm_fleet.serving import engine
from glm_fleet.serving.client import complete, served_model
from glm_fleet.serving.deployment import UNIT, Deployments, Places
from glm_fleet.serving.evidence import read_evidence
from glm_fleet.serving.policy import read_api_key, read_policy
from glm_fleet.serving.probe import Sample
from glm_fleet.serving.record import read_record
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

# The answers that the tests of the health package judge.
sys.path.append(str(Path(__file__).parent / "health"))
from test_judge import TIME, fleet_records
from test_preflight import EXPECT

NVIDIA_SMI = Path(__file__).parent / "fixtures/nvidia-smi"
TEMPLATE = Path(__file__).resolve().parents[2] / "roles/health/templates/fleet.html.j2"

_DEEP: list[Any] = []
for _ in range(60):
    _DEEP = [_DEEP]
GONE = object()
WRONG: tuple[Any, ...] = (
    GONE,
    None,
    True,
    0,
    -1,
    1.5,
    1e308,
    10**400,
    float("inf"),
    float("nan"),
    "",
    "x",
    "\ud800\x00\x1b[2J",
    "%s {0} \\",
    [],
    ["x"],
    {},
    {"x": {"y": 1}},
    _DEEP,
)
Place = tuple[Any, ...]


def places(value: Any, here: Place = ()) -> Iterator[Place]:
    """Yield the place of every value in plain data, also of what holds others."""
    if here:
        yield here
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from places(each, (*here, key))
    elif isinstance(value, list):
        for number, each in enumerate(value):
            yield from places(each, (*here, number))


def changed(value: Any, place: Place, wrong: Any) -> Any:
    """Return plain data with one other value in it."""
    copied = copy.copy(value)
    if len(place) > 1:
        copied[place[0]] = changed(value[place[0]], place[1:], wrong)
    elif wrong is GONE:
        del copied[place[0]]
    else:
        copied[place[0]] = wrong
    return copied


def mutations(value: Any) -> Iterator[tuple[Place, Any, Any]]:
    """Yield (place, what is there instead, all of it) for every place and every wrong value."""
    for wrong in WRONG[1:]:
        yield (), wrong, wrong
    for place in places(value):
        for wrong in WRONG:
            yield place, wrong, changed(value, place, wrong)


def answers_of_a_fleet() -> dict[str, dict[str, Any]]:
    """Return what was gathered of three nodes with two real GPUs each, and of their gateway."""

    def nvidia_smi(argv: Sequence[str], **_: Any) -> RunResult:
        name = {"-q": "q.xml", "topo": "topo.txt"}.get(argv[1], "query.csv")
        return RunResult(0, (NVIDIA_SMI / f"h200-x2-{name}").read_text(), "")

    records = fleet_records()
    for name in ("gpu", "fabric_manager", "xids"):
        del records["gw01"]["node"][name]
    for record in records.values():
        if "gpu_nodes" not in record["groups"]:
            continue
        facts = record["node"]
        facts["gpu"] = read_gpus(nvidia_smi).as_dict()
        for gpu in facts["gpu"]["gpus"]:
            gpu["processes"] = [{"pid": 41, "name": "x", "used_mib": 7, "unit": "a.service"}]
        facts["xids"] = [
            {"kind": "Xid", "code": 79, "device": "0000:01", "time_s": 1.0, "message": "lost"}
        ]
        facts["listeners"] = [
            {"port": 8000, "pid": 7, "name": "a", "user": "b", "unit": "c", "command": "d"}
        ]
        facts["verified"] = [{"kind": "model", "id": "glm-123", "damage": []}]
        facts["protected"] = ["glm-123"]
        facts["errors"] = ["units: no answer"]
        record["expect"] = [{"gpu_node": True, "expect": {**EXPECT, "gpu_count": 2}}]
    return records


def everything(records: Mapping[str, Mapping[str, Any]], *, draw: bool) -> dict[str, Any]:
    """Make every report of these answers, as fleet_report does; return the rows of health.

    To ``draw`` the page compiles its template: what is drawn is made in any case.
    """
    problems = judge_hosts(records)
    render_preflight(list(records), problems, 120)
    json.dumps(preflight_json(list(records), problems, TIME), allow_nan=False).encode()
    nodes, gateways = judge_fleet(records, limits=Limits(), previous={}, time=TIME)
    for line in render_health(nodes, gateways, 120):
        line.text.encode()
    report = health_json(nodes, gateways, TIME)
    json.dumps(report, allow_nan=False).encode()
    json.dumps(view(report, [report])).encode()
    if draw:
        render_page(report, [report], TEMPLATE).encode()
    exposition(report).encode()
    find_events(report, {})
    hosts = {each["name"]: each for each in (*report["nodes"], *report["gateways"])}
    return {**hosts, "preflight": [each for each in problems if each.host != "gpu02"]}


@pytest.mark.parametrize("host", ["gpu02", "gw01"])
def test_one_wrong_value_changes_the_row_of_its_host_only(host: str) -> None:
    records = answers_of_a_fleet()
    right = everything(records, draw=True)
    refused = taken = 0
    for place, wrong, facts in mutations(records[host]["node"]):
        try:
            decode_facts(host, facts)
        except FleetError:
            refused += 1
            # One refusal is like another.
            if refused % 50:
                continue
        else:
            taken += 1
        changed_records = {**records, host: {**records[host], "node": facts}}
        found = everything(changed_records, draw=not (refused + taken) % 50)
        if host == "gpu02":
            found[host] = right[host]
            assert found == right, (place, wrong)
    assert refused > 500
    assert taken > 100


WORDS = ("", "x", "\n", "NaN", "1e999", "-1", "1_0", "9" * 5000, "\u00b2", "\x00", "\udcff", "[]")
# What a broken tool, a proxy, an old version or somebody's hand puts into a text.
BITS = (
    "", "\n", "\n\n", " ", ",", "\t", "\r", "\x00", "\x1b[2J", "\udcff", "\u00b2", "\u0663",
    "{", "[", '"',
    "NaN", "Infinity", "1e999", "-1", "1_0", "0x10", "9" * 5000, "null", "true", "[]", "{}",
    "[" * 3000, "# ", ": ", "=", "../", "/etc/passwd",
)  # fmt: skip


def one_wrong(good: str) -> Iterator[str]:
    """Yield the text with one word, or one value of its JSON, replaced."""
    for word in re.finditer(r"[^\s{}\[\]\",=:|]+|\n", good):
        for bit in WORDS:
            yield good[: word.start()] + bit + good[word.end() :]
    for line in good.split("\n"):
        begin = min((each for each in (line.find("{"), line.find("[")) if each >= 0), default=-1)
        try:
            value = json.loads(line[begin:])
        except ValueError:
            continue
        for _, _, whole in mutations(value):
            yield good.replace(line, line[:begin] + json.dumps(whole), 1)


@st.composite
def damaged(draw: st.DrawFn, good: str) -> str:
    """Return the text with up to three pieces of it replaced."""
    text = good
    for _ in range(draw(st.integers(1, 3))):
        begin = draw(st.integers(0, len(text)))
        end = begin + draw(st.sampled_from((0, 1, 1, 2, 5, 40, len(text))))
        text = text[:begin] + draw(st.sampled_from(BITS)) + text[end:]
    return text


@dataclass(frozen=True)
class Reader:
    """Something that reads text from outside; ``good`` is such a text, as it should be."""

    name: str
    good: str
    read: Callable[[str, Path], object]

    def __str__(self) -> str:
        return self.name


def in_file(read: Callable[[Path], object], name: str = "x.json") -> Callable[[str, Path], object]:
    """Return a reader of text for one of files."""

    def through(text: str, folder: Path) -> object:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode(errors="surrogateescape"))
        return read(path)

    return through


def server(text: str) -> Http:
    """Return a server that answers everything with this text."""
    return lambda path, body=None: (200, iter(text.split("\n")))


def program(text: str) -> Runner:
    """Return a program that prints this text, whatever it is asked."""
    return lambda *_, **__: RunResult(0, text, "")


METRICS = """\
# HELP vllm:num_requests_running x
vllm:num_requests_running{engine="0"} 2
vllm:num_requests_waiting{engine="0"} 3
vllm:kv_cache_usage_perc{engine="0"} 0.25
vllm:iteration_tokens_total_count{engine="0"} 7
vllm:generation_tokens_total{engine="0"} 8.0
vllm:time_to_first_token_seconds_bucket{engine="0",le="0.1"} 2
vllm:time_to_first_token_seconds_bucket{engine="0",le="+Inf"} 10
vllm:time_to_first_token_seconds_count{engine="0"} 10
vllm:time_to_first_token_seconds_sum{engine="0"} 2.5
"""
COMPLETION = (
    'data: {"choices": [{"text": "x"}], "usage": {"completion_tokens": 24, "prompt_tokens": 3}}\n'
    "data: [DONE]"
)
MODELS = json.dumps({"data": [{"id": "glm-5.2", "max_model_len": 32768}]})
POLICY = json.dumps(
    {"address": "::1", "port": 8000, "served_model_name": "glm-5.2",
     "required": ["TRITON_MLA"], "forbidden": ["Enforce eager"]}
)  # fmt: skip
RECORD = json.dumps(
    {"release": "vllm-1", "model": "glm-1", "unit_sha256": "0", "environment_sha256": "1",
     "invocation": "i1"}
)  # fmt: skip
UNITS = "Id=glm-serving.service\nActiveState=active\nNRestarts=2\nMainPID=41\nInvocationID=i1\n"
DEPLOYMENT = "0123456789ab"


def sample_of(text: str, _: Path) -> object:
    """Read a sample twice, and what happened between them."""
    sample = engine.parse_sample(text, 7.0)
    json.dumps(sample, allow_nan=False)
    if sample:
        # What the node sends is read on the controller.
        decode(Sample, sample, what="The sample")
        json.dumps(engine.interval(sample, {**sample, "time_s": 8.0}), allow_nan=False)
    return sample


def deployments_of(name: str, look: Callable[[Deployments], object]) -> Callable[[str, Path], Any]:
    """Return a reader of one file of a node's deployments, the others being as they should."""

    def through(text: str, folder: Path) -> object:
        root = folder / "deployments"
        places_ = Places(deployments=root, etc=folder, releases=folder, models=folder)
        for path in (root / DEPLOYMENT, folder / "r", folder / "m"):
            path.mkdir(parents=True, exist_ok=True)
        for each, content in {
            f"{DEPLOYMENT}/{UNIT}": "[Service]\n",
            f"{DEPLOYMENT}/serving.env": "A=b\n",
            f"{DEPLOYMENT}/attestation.json": POLICY,
            f"{DEPLOYMENT}/deployment.json": DEPLOYED,
            "attested.json": json.dumps([DEPLOYMENT]),
            name: text,
        }.items():
            (root / each).write_bytes(content.encode(errors="surrogateescape"))
        return look(Deployments(places_))

    return through


def watched(text: str, folder: Path) -> object:
    """Look three times at an engine that answers with this text."""
    policy = folder / "policy.json"
    policy.write_text(POLICY)
    watch = Watchdog(
        WatchSettings(
            "x.service", 40.0, 2, folder / "incidents", "py-spy", policy, folder / "none"
        ),
        program(UNITS),
        Flag(folder / "stalled", sleep=lambda _: None),
        client=lambda port, **_: server(text),
        clock=lambda: 0.0,
        sleep=lambda _: None,
        processes=list,
    )
    return [watch.look() for _ in range(3)]


DEPLOYED = json.dumps({"id": DEPLOYMENT, "release": "r", "model": "m", "cuda_graphs": "piecewise"})

READERS = (
    Reader("metrics", METRICS, sample_of),
    Reader("completion", COMPLETION, lambda text, _: complete(server(text), "glm-5.2", "x")),
    Reader("served model", MODELS, lambda text, _: served_model(server(text), "glm-5.2")),
    Reader("policy", POLICY, in_file(read_policy)),
    Reader("api key", "# x\nVLLM_API_KEY='a b'\n", in_file(read_api_key)),
    Reader("start record", RECORD, in_file(read_record)),
    Reader("evidence", RECORD, in_file(lambda path: read_evidence(path, "i1"))),
    Reader("readiness", RECORD, in_file(lambda path: readiness_answer(path, path, path))),
    Reader("units", UNITS, lambda text, _: unit_state(program(text), "glm-serving.service")),
    Reader("watchdog", METRICS, watched),
    Reader(
        "deployment",
        DEPLOYED,
        deployments_of(f"{DEPLOYMENT}/deployment.json", lambda all_: all_.read(DEPLOYMENT).digests),
    ),
    Reader(
        "attested",
        json.dumps([DEPLOYMENT]),
        deployments_of("attested.json", lambda all_: (all_.before(""), all_.named("r"))),
    ),
    Reader(
        "refused",
        json.dumps({"reason": "x"}),
        deployments_of(f"{DEPLOYMENT}/refused.json", lambda all_: all_.refused(DEPLOYMENT)),
    ),
)


@pytest.mark.parametrize("reader", READERS, ids=str)
def test_a_reader_refuses_or_reads_one_wrong_value(reader: Reader, tmp_path: Path) -> None:
    # What is right is read; what is wrong may be refused.
    reader.read(reader.good, tmp_path)
    for text in one_wrong(reader.good):
        with contextlib.suppress(FleetError):
            reader.read(text, tmp_path)


@pytest.mark.parametrize("reader", READERS, ids=str)
@given(data=st.data())
@settings(
    derandomize=True,
    max_examples=40,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
def test_a_reader_refuses_or_reads_damage(
    reader: Reader, tmp_path: Path, data: st.DataObject
) -> None:
    with contextlib.suppress(FleetError):
        reader.read(data.draw(damaged(reader.good)), tmp_path)
