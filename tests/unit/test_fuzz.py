# SPDX-License-Identifier: Apache-2.0
"""Whatever comes from outside is read, or refused with a `FleetError`: nothing else, and no loop.

Bounded and the same on every run: what is tried is chosen by position, or by Hypothesis without
a random seed.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable

import pytest
from glm_fleet.artifact.hashes import Proven
from glm_fleet.artifact.manifest import FileEntry, Manifest, artifact_id, load_manifest
from glm_fleet.artifact.merkle import hash_file
from glm_fleet.artifact.retention import protected_by
from glm_fleet.artifact.store import Store
from glm_fleet.bench import quality, tuned
from glm_fleet.bench.page import is_before
from glm_fleet.bench.page import render_page as render_benchmark_page
from glm_fleet.bench.report import read_report
from glm_fleet.bench.roofline import read_shape
from glm_fleet.core.decode import decode, parse, read
from glm_fleet.core.errors import FleetError
from glm_fleet.core.http import Http
from glm_fleet.core.progress import Meter, Progress, bar, from_json
from glm_fleet.core.runner import Runner, RunResult
from glm_fleet.core.systemd import unit_state
from glm_fleet.fleet import authority
from glm_fleet.fleet.fingerprints import read_fingerprints
from glm_fleet.fleet.front_door import Wanted, decide
from glm_fleet.fleet.lock import FleetLock
from glm_fleet.gateway.answer import FrontDoor
from glm_fleet.gateway.clients import Clients, converge
from glm_fleet.gateway.clients import parse as parse_clients
from glm_fleet.gateway.haproxy import Haproxy, describe
from glm_fleet.gateway.state_file import is_saved
from glm_fleet.gateway.statistics import parse_old_workers
from glm_fleet.health import history
from glm_fleet.health.exposition import exposition
from glm_fleet.health.hardware import Problem
from glm_fleet.health.html import render_page, view
from glm_fleet.health.judge import judge_fleet
from glm_fleet.health.memory import judge_memory
from glm_fleet.health.notify import find_events, notify
from glm_fleet.health.preflight import judge_hosts
from glm_fleet.health.tables import health_json, preflight_json, render_health, render_preflight
from glm_fleet.health.verdict import GatewayHealth, Limits, NodeHealth
from glm_fleet.model import source
from glm_fleet.model.adopt import CLIENT_RECORDS, folder_manifest
from glm_fleet.model.client import read_listing
from glm_fleet.model.fit import read_config, read_header
from glm_fleet.model.partfile import Part
from glm_fleet.model.pins import pinned
from glm_fleet.node.acceptance import table as acceptance_table
from glm_fleet.node.acceptance.answer import read_kernels, read_load, read_together
from glm_fleet.node.acceptance.dcgm import read_dcgm
from glm_fleet.node.acceptance.judge import judge as judge_gpus
from glm_fleet.node.acceptance.record import fingerprint, read_acceptance, why_needed
from glm_fleet.node.answer import decode_facts
from glm_fleet.node.artifacts import read_artifacts
from glm_fleet.node.facts import read_node
from glm_fleet.node.gateway import read_certificates
from glm_fleet.node.gpu import read_gpus
from glm_fleet.node.kernel import parse_xids
from glm_fleet.node.prestart import memory_in_use
from glm_fleet.node.query import Host, NodeQuery
from glm_fleet.node.readiness import answer as readiness_answer
from glm_fleet.node.remote_call import answer_in
from glm_fleet.node.root import Helper
from glm_fleet.node.watchdog import Flag, Watchdog
from glm_fleet.node.watchdog import Settings as WatchSettings
from glm_fleet.node.xid import faults
from glm_fleet.release.commit_wheel import read_wheels
from glm_fleet.release.environment import read_recipe
from glm_fleet.release.installed import COMPLETE, find_damage, is_complete
from glm_fleet.release.wheel_lock import WheelTarget, parse_lock
from glm_fleet.serving import answers, engine, needles
from glm_fleet.serving.answers import Prompt
from glm_fleet.serving.client import complete, served_model
from glm_fleet.serving.deployment import UNIT, Deployments, Places
from glm_fleet.serving.evidence import read_evidence
from glm_fleet.serving.policy import read_api_key, read_policy
from glm_fleet.serving.probe import Sample
from glm_fleet.serving.record import read_record
from glm_fleet.serving.rehearsal import cut_config, exec_words
from glm_fleet.serving.rehearsals import read_rehearsals
from glm_fleet.transfer.rendezvous import AgentAnswer, Meeting, Record
from glm_fleet.transfer.torrent import Bundle, make_torrent, torrent_roots
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
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
        name = {"-q": "q.xml", "topo": "topo.txt"}.get(argv[1])
        text = (NVIDIA_SMI / f"h200-x2-{name}").read_text() if name else QUERY
        return RunResult(0, text, "")

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
        facts["environment"] = {"release": "r", "damage": ["a: missing"]}
        facts["attestation"]["cuda_graphs"] = {"runs": "eager", "wanted": "full", "reason": "x"}
        facts["errors"] = ["units: no answer"]
        facts["acceptance"] = {
            "needed": ["it did not pass"], "passed": False, "time_s": 1.0, "release": "r",
            "faults": [FAULT], "figures": [{"index": 0, "tflops": 260.5}],
        }  # fmt: skip
        record["expect"] = [{"gpu_node": True, "expect": {**EXPECT, "gpu_count": 2}}]
    return records


Judged = tuple[list[NodeHealth], list[GatewayHealth], list[Problem]]


def judged(records: Mapping[str, Mapping[str, Any]]) -> Judged:
    """Judge these answers, as preflight and as the health check do."""
    nodes, gateways = judge_fleet(records, limits=Limits(), previous={}, time=TIME)
    return nodes, gateways, judge_hosts(records)


def report(records: Mapping[str, Any], found: Judged, *, draw: bool) -> None:
    """Make everything of it that fleet_report makes; to ``draw`` the page is slow."""
    nodes, gateways, problems = found
    lines = render_preflight(list(records), problems, 120) + render_health(nodes, gateways, 120)
    "".join(line.text for line in lines).encode()
    json.dumps(preflight_json(list(records), problems, TIME), allow_nan=False).encode()
    health = health_json(nodes, gateways, TIME)
    json.dumps(health, allow_nan=False).encode()
    json.dumps(view(health, [health])).encode()
    if draw:
        render_page(health, [health], TEMPLATE).encode()
    exposition(health).encode()
    find_events(health, {})


def others(found: Judged, host: str) -> list[Any]:
    """Return what was found about the other hosts."""
    nodes, gateways, problems = found
    return [
        *(each for each in (*nodes, *gateways) if each.name != host),
        *(each for each in problems if each.host != host),
    ]


@pytest.mark.parametrize("host", ["gpu02", "gw01"])
def test_one_wrong_value_changes_the_row_of_its_host_only(host: str) -> None:
    records = answers_of_a_fleet()
    right = judged(records)
    report(records, right, draw=True)
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
            # Every other one, in a step that no row of wrong values shares.
            if taken % 2:
                continue
        answers = {**records, host: {**records[host], "node": facts}}
        found = judged(answers)
        if (refused + taken) % 3 == 0:
            report(answers, found, draw=not (refused + taken) % 60)
        # What a gateway says of the nodes stands in their rows.
        if host == "gpu02":
            assert others(found, host) == others(right, host), (place, wrong)
    assert refused > 500
    assert taken > 100


# More tries of one text bring nothing new.
MOST_TRIES = 150
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


def said(text: str) -> Callable[[str], str]:
    """Return a HAProxy that answers everything with this text."""
    return lambda command: text


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
     "required": ["TRITON_MLA"], "forbidden": ["Enforce eager"],
     "answers": {"tolerance": 0.5, "drift": 0.15, "needles": True}}
)  # fmt: skip
QUESTIONS = json.dumps({"question": "What is 3 and 4?", "answer": "#### 7"})
_SPREAD = {"median": 10.0, "p95": 20.0, "p99": 30.0}
BENCHMARK = {
    "schema": "glm-fleet/benchmark/1",
    "time": "2026-01-01T00:00:00+00:00",
    "settings": {"prompt_tokens": 512, "output_tokens": 256},
    "targets": [
        {
            "name": "gpu01", "path": "node", "release": "r", "error": "", "warnings": [],
            "levels": [
                {"streams": 1, "decode_per_stream": 5.0, "decode_together": 5.0, "ratio": None,
                 "output_rate": 4.0, "reference": 5.0, "ttft_ms": _SPREAD, "itl_ms": _SPREAD,
                 "limit": 9.0},
            ],
            "prompts": [{"prompt_tokens": 9, "cold": _SPREAD, "warm": _SPREAD}],
        }
    ],
}  # fmt: skip
BENCHMARK_PAGE = Path(__file__).resolve().parents[2] / "roles/benchmark/templates/benchmark.html.j2"
SHAPED = {
    "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 8, "kv_lora_rank": 4,
    "index_topk": 2, "index_head_dim": 4, "n_routed_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip
TUNE = """{"schema": "glm-fleet/tune/1", "node": "gpu01", "state": "running", "before": "a",
"running": "b", "began": "2026-01-01T00:00:00+00:00", "load": {"streams": [1]}, "left_out": {},
"settings": {"serving_max_num_seqs": [32, null]}, "ended": "", "tries": [{"settings": {"--x": true},
"rates": [{"1": 5.0}], "started": true, "start_s": 1.0, "measure_s": 2.0, "problem": "",
"confirms": false}]}"""
NODE_WHEELS = WheelTarget("3.12", "x86_64-manylinux_2_35")
WHEELS = json.dumps([{"package_name": "vllm", "platform_tag": "manylinux_2_28_x86_64",
                      "path": "../../vllm-1-py3-none-any.whl", "sha256": "ab" * 32}])  # fmt: skip
SCORES = json.dumps([{"release": "r", "model": "m", "questions": "q", "right": "101"}])
PROMPT = Prompt("3 tokens", [7, 8, 9])
LIKELY = json.dumps(
    {"choices": [{"logprobs": {"tokens": ["a"] * 16, "top_logprobs": [{"a": -0.5, "b": -2}] * 16}}]}
)
SPOKEN = json.dumps({"choices": [{"message": {"role": "assistant", "content": "KESTREL-4096"}}]})
STEPS = [{"token": "a", "listed": {"a": -0.5, "b": -2.0}}]
KEPT_ANSWERS = json.dumps(
    {"prompts": "x", "release": "r", "model": "m", "invocation": "i1",
     "said": [{"prompt": "3 tokens", "steps": STEPS}]}
)  # fmt: skip
RECORD = json.dumps(
    {"release": "vllm-1", "model": "glm-1", "unit_sha256": "0", "environment_sha256": "1",
     "invocation": "i1"}
)  # fmt: skip
REHEARSALS = json.dumps(
    [{"gpus": "8 x A100", "driver": "550.54", "release": "vllm-1", "cuda_graphs": "eager",
      "command": "0a", "passed": True, "problem": "", "seconds": 90.5, "time_s": 1.7e9,
      "layers": 7, "of_layers": 78}]
)  # fmt: skip
CONFIG = json.dumps(
    {"num_hidden_layers": 4, "mlp_layer_types": ["dense", "dense", "sparse", "sparse"],
     "first_k_dense_replace": 2, "moe_layer_freq": 1, "index_topk_freq": 2,
     "index_skip_topk_offset": 1, "index_topk_pattern": "FFSS", "text_config": None}
)  # fmt: skip
EXEC = '[Service]\nExecStart=/r/bin/vllm serve /m --port 8000 --c "{\\"a\\":1}"\n'
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
        WatchSettings("x.service", 40.0, 2, folder / "incidents", policy, folder / "none"),
        program(UNITS),
        Flag(folder / "stalled", folder / "told.json", sleep=lambda _: None),
        client=lambda port, **_: server(text),
        clock=lambda: 0.0,
        sleep=lambda _: None,
        processes=list,
    )
    return [watch.look() for _ in range(3)]


DEPLOYED = json.dumps({"id": DEPLOYMENT, "release": "r", "model": "m", "cuda_graphs": "piecewise"})

STATISTICS = """\
# pxname,svname,scur,stot,status,weight,check_status,lastchg,last_chk
glm_nodes,FRONTEND,,,OPEN,,,,
glm_nodes,gpu01,1,40,UP,100,* L7OK,7,"200, fine"
glm_nodes,gpu02,0,3,NOLB,100,L4CON,,
"""
SERVERS = (
    "1\n# be_id be_name srv_id srv_name srv_addr srv_admin_state srv_fqdn srv_port\n"
    "3 glm_nodes 1 gpu01 192.0.2.11 0 - 8000\n3 glm_nodes 2 gpu02 2001:db8::1 8 - 8000\n"
)
QUERY = "".join(f"{n}, GPU-00000000-0000-0000-0000-00000000000{n + 1}, 9.0\n" for n in (0, 1))
INFO = "Name: HAProxy\nVersion: 2.6.12\nUptime_sec: 7\n"
WORKERS = """\
#<PID>          <type>          <relative PID>  <reloads>       <uptime>
7               master          0               1               0d00h01m

# old workers
11              worker          0               1               0d00h01m
# programs
"""
KERNEL = "\n".join(
    json.dumps({"MESSAGE": text, "__REALTIME_TIMESTAMP": "1795000000000000"})
    for text in (
        "NVRM: loading NVIDIA UNIX x86_64 Kernel Module  580.159.04",
        "NVRM: Xid (PCI:0000:4e:00): 79, pid=7, name=python, GPU has fallen off the bus.",
        "nvidia-nvswitch3: SXid (PCI:0000:0a:00.0): 20034, Fatal, Link 31 LTSSM Fault Up",
    )
)
LISTED = converge(
    Clients(),
    [{"name": "alice", "sha256": ["ab" * 32], "priority": 5, "paths": ["GET /v1/models"]}],
    "2026-11-27T10:00:00+00:00",
).text()
ISSUED_AT = datetime(2026, 11, 27, tzinfo=timezone.utc)
with tempfile.TemporaryDirectory() as _folder:
    AUTHORITY = authority.ensure(Path(_folder), ISSUED_AT)
    ISSUED = authority.issue(AUTHORITY, ["gw01", "192.0.2.11"], ISSUED_AT)
DOORS = json.dumps(
    {
        "gw01": {
            "certificate": {"path": "/x.pem", "error": "", "expires_s": 7.5, "chain": ISSUED},
            "serves": "tls",
        }
    }
)


def decided(text: str) -> object:
    """Decide what a gateway that told this needs, as the gateway gw01."""
    doors = parse(dict[str, FrontDoor], text, what="it")
    wanted = Wanted("auto", "", "/x.pem", ["gw01"], ["192.0.2.11"])
    return decide(wanted, "gw01", doors, AUTHORITY, ISSUED_AT) if "gw01" in doors else None


CLIENTS = """\
# table: glm_clients, type: string, size:100000, used:1
0x5: key=a exp=0 gpc0=7 conn_cur=1 http_req_cnt=9 http_fail_cnt=0 bytes_in_cnt=5 bytes_out_cnt=6
"""
CERTIFICATE = "Filename: /etc/x.pem\nStatus: Used\nNot After: Nov 27 10:00:00 2027 GMT\n"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
LISTING = json.dumps(
    {
        "sha": COMMIT,
        "siblings": [
            {"rfilename": "config.json", "size": 7, "lfs": None, "blob_id": COMMIT},
            {"rfilename": "a/1.safetensors", "lfs": {"size": 9, "sha256": "ab" * 32}},
        ],
    }
)
INDEX = json.dumps({"metadata": {}, "weight_map": {"a.b": "model-1.safetensors"}})
MODEL_CONFIG = json.dumps(
    {
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "hidden_size": 64,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 4,
        "index_topk": 32,
        "index_topk_freq": 2,
        "index_topk_pattern": "FSSF",
        "max_position_embeddings": 4096,
        "quantization_config": {"config_groups": {"a": {"weights": {"symmetric": False}}}},
    }
)
SHARD_HEADER = json.dumps(
    {
        "__metadata__": {"format": "pt"},
        "model.layers.0.a.weight": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [0, 8]},
    }
)
MODEL_SIZE = json.dumps(
    {
        "repository": "a/b",
        "commit": COMMIT,
        "config": json.loads(MODEL_CONFIG),
        "sharded": 8_000_000,
        "replicated": 1000,
        "indexers": {"0": 7},
    }
)
TOLD = json.dumps({"told": {"gpu01": "broken"}, "waiting": [{"id": "x", "text": "y"}]})


def sized(text: str, _: Path) -> object:
    """Judge the memory of a node by what was kept of a model's size."""
    told = {
        "tensor_parallel": 2,
        "utilisation": 0.9,
        "context": "4096",
        "release": "v0.24.0",
        "size": parse(dict[str, Any], text, what="The size of the model"),
        "unknown": "",
    }
    return judge_memory(fleet_records(1), told)


def haproxy_of(**answers: str) -> Haproxy:
    """Return a HAProxy with other answers to ``show``: info, stat, state."""
    known = {
        "info": INFO,
        "stat": STATISTICS,
        "state": SERVERS,
        **answers,
    }
    return Haproxy(lambda command: known.get(command.split()[-1], ""))


def gpus_of(**answers: str) -> object:
    """Read GPUs whose nvidia-smi answers one question otherwise: xml, query, topo."""
    known = {
        "xml": (NVIDIA_SMI / "h200-x2-q.xml").read_text(),
        "query": QUERY,
        "topo": (NVIDIA_SMI / "h200-x2-topo.txt").read_text(),
        **answers,
    }

    def nvidia_smi(argv: Sequence[str], **_: Any) -> RunResult:
        return RunResult(0, known[{"-q": "xml", "topo": "topo"}.get(argv[1], "query")], "")

    found = read_gpus(nvidia_smi).as_dict()
    json.dumps(found, allow_nan=False)
    return found


def kernel_log(text: str, _: Path) -> object:
    """Read the kernel's lines, and judge them as the controller does."""
    lines = list(parse_xids(text))
    facts = decode_facts("gpu01", {"xids": lines, "gpu": {"gpus": []}})
    return faults(facts["xids"])


def node(text: str, folder: Path) -> object:
    """Read a whole host of which every tool and every file of the system says this."""
    for name in ("meminfo", "uptime", "os-release"):
        (folder / name).write_bytes(text.encode(errors="surrogateescape"))
    host = Host(program(text), proc=folder, os_release=folder / "os-release")
    facts = read_node(NodeQuery(paths=["/"], controller_epoch=7.0), host)
    json.dumps(facts, allow_nan=False)
    return decode_facts("gpu01", facts)


def listing(text: str, _: Path) -> object:
    """Read what the hub's client makes of an answer."""
    try:
        info = json.loads(text, object_hook=lambda each: SimpleNamespace(**each))
    except (ValueError, RecursionError):
        # This far the client reads itself.
        return None
    return read_listing(info, "The hub")


def adopted(text: str, folder: Path) -> object:
    """Take over a folder of weights with this index."""
    record = folder / CLIENT_RECORDS / f"{source.INDEX}.metadata"
    record.parent.mkdir(parents=True, exist_ok=True)
    index = folder / source.INDEX
    index.write_bytes(text.encode(errors="surrogateescape"))
    record.write_text(f"{COMMIT}\n{source.git_blob_id(index)}\n0\n")
    wanted = source.Source("a/b", COMMIT, (), exclude=("*.safetensors",))
    return folder_manifest(folder, wanted, None, Meter(lambda _: None))


def part(text: str, folder: Path) -> object:
    """Continue a file of which this was noted."""
    path = folder / "model.bin"
    path.write_bytes(b"x" * 100)
    path.with_name(f"{path.name}%segments").write_bytes(text.encode(errors="surrogateescape"))
    found = Part(path, 100, 4)
    return [found.missing(number) for number in range(len(found))]


def pins(text: str, folder: Path) -> object:
    """Ask which commit a branch stands for."""
    (folder / ".pins.json").write_bytes(text.encode(errors="surrogateescape"))
    return pinned(Store(folder), source.Source("a/b", "main", ()))


def told(text: str, folder: Path) -> object:
    """Tell what changed since this was told."""
    path = folder / "told.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    return notify(KEPT, path, None, lambda line: None)


def kept(text: str, folder: Path) -> object:
    """Judge the fleet again with this as the last report, and draw it."""
    (folder / "2026-11-22T10-00-00Z.json").write_bytes(text.encode(errors="surrogateescape"))
    reports = history.load(folder, 5)
    records = fleet_records(1)
    nodes, gateways = judge_fleet(
        records, limits=Limits(), previous=history.latest(reports), time=TIME
    )
    report = health_json(nodes, gateways, TIME, history.latest(reports))
    json.dumps(view(report, reports), allow_nan=False).encode()
    return [history.sentence(each) for each in report["changes"]]


def manifest_of(files: Sequence[FileEntry]) -> str:
    """Return a manifest as it is written."""
    return Manifest(
        "model", artifact_id("glm", files), tuple(files), {"revision": COMMIT}
    ).as_json()


MANIFEST = manifest_of([FileEntry("a/b.bin", 7, "ab" * 32), FileEntry("c", 0, "cd" * 32)])


def manifests(text: str, folder: Path) -> object:
    """Look at artifacts on a node, of which one has this manifest."""
    path = folder / "model" / "glm-1" / "manifest.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(errors="surrogateescape"))
    errors: list[str] = []
    found = read_artifacts(folder, ["revision"], errors)
    json.dumps([found, errors], allow_nan=False)
    plan = folder / ".staging" / "model" / "x.plan.json"
    plan.parent.mkdir(parents=True, exist_ok=True)
    plan.write_bytes(path.read_bytes())
    store = Store(folder)
    return [store.published("model"), store.plans("model"), load_manifest(path.parent)]


def proven(text: str, folder: Path) -> object:
    """Ask what was hashed, with this as the memory."""
    (folder / "x.proven").write_bytes(text.encode(errors="surrogateescape"))
    (folder / "a").write_text("a")
    memory = Proven(folder / "x.proven")
    return [memory.known(folder, "a"), memory.root(folder, "a"), memory.sha256(folder, "a")]


def lock(name: str) -> Callable[[str, Path], object]:
    """Return a reader of the fleet's lock and holds, of which this is one file."""

    def through(text: str, folder: Path) -> object:
        (folder / name).write_bytes(text.encode(errors="surrogateescape"))
        known = FleetLock(folder)
        json.dumps([known.roll(), known.held()])
        with contextlib.suppress(FleetError):
            known.take({"run": "r2", "owner": "o"}, replace="", now="2026-11-27T10:00:00+00:00")
        known.hold("gpu01", by="o", reason="r", now="2026-11-27T10:00:00+00:00")
        return known.unhold("gpu01")

    return through


ROLL = json.dumps(
    {"run": "r1", "operation": "upgrade", "owner": "o", "controller": "c", "pid": 7,
     "pid_start": 8, "taken": "2026-11-27T09:00:00+00:00", "seen": "2026-11-27T09:00:00+00:00",
     "state": "running", "targets": {"gpu01": "0"}, "backs": {}}
)  # fmt: skip
AGENT = json.dumps(
    {"artifact": "x", "standing": "working", "failure": {}, "notes": ["a"], "received": 7,
     "progress": {"what": "x", "done": 1, "total": 2, "rate": 0.5}, "torrents": {"0": "AAAA"},
     "unknown": ["1"], "busy": True}
)  # fmt: skip


def agent(text: str, folder: Path) -> object:
    """Take what the agent of a node answers to where the workers meet."""
    answer = parse(AgentAnswer, text, what="The agent's answer")
    meeting = Meeting(folder, "a", ["a", "b"], stall_timeout=7.0, check=lambda *_: None)
    meeting.keep(answer.get("torrents", {}))
    record = Record.of(answer)
    meeting.say(record)
    others = Meeting(folder, "b", ["a", "b"], stall_timeout=7.0, check=lambda *_: None).others()
    shown = [bar(Progress(**each.progress)) for each in others.values() if each.progress]
    return [shown, meeting.hopeless(record, others)]


def met(text: str, folder: Path) -> object:
    """Ask how the others are, of which one left this."""
    (folder / "b.json").write_bytes(text.encode(errors="surrogateescape"))
    return Meeting(folder, "a", ["a", "b"], stall_timeout=7.0, check=lambda *_: None).others()


def as_kept(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return a report as it is kept."""
    with tempfile.TemporaryDirectory() as folder:
        history.save(Path(folder), report, 1)
        (path,) = Path(folder).iterdir()
        saved: dict[str, Any] = json.loads(path.read_text())
    return saved


KEPT = as_kept(
    health_json(*judge_fleet(fleet_records(1), limits=Limits(), previous={}, time=TIME), TIME)
)

KERNELS = {"rows": [{"case": "a", "outside": 0, "wrong": 1, "of": 9, "worst": 0.5}]}
LOAD = {
    "begun": 1.0, "ended": 2.0, "digests": ["a"], "differences": 0, "tflops": 260.5,
    "gbytes_per_second": 1700.5, "memory_tested_bytes": 8, "memory_wrong": 0,
}  # fmt: skip
TOGETHER = {"wrong": 0, "of": 9, "bus_gbytes_per_second": 230.5, "peers": [[0, 1]]}
DCGM = {"tests": [{"name": "memory", "results": [{"entity_id": 0, "status": "Fail"}]}]}
TRIALS = json.dumps({"kernels": KERNELS, "load": LOAD, "together": TOGETHER})
FAULT = {"check": "c", "where": "GPU 0", "expected": "e", "found": "f", "remedy": "r", "gpu": 0,
         "of_release": False}  # fmt: skip
ACCEPTED = json.dumps(
    {
        "schema": 1, "time_s": 1.0, "seconds": 9.5, "release": "r", "passed": False,
        "fingerprint": {"gpus": {"GPU-0": "1"}, "driver": "580", "kernels": "k"},
        "modules": ["vllm.x"], "faults": [FAULT], "notes": ["n"], "dcgm": None,
        "gpus": [{"index": 0, "uuid": "GPU-0", "serial": "1", "name": "A100", "errors": {},
                  "load": LOAD, "kernels": KERNELS, "sampled": {"sm_clock_mhz": 9}}],
    }
)  # fmt: skip


def trials(text: str, _: Path) -> object:
    """Judge what a GPU answered."""
    answer = parse(dict[str, Any], text, what="x")
    trial: Any = {
        "index": 0,
        "kernels": read_kernels(answer.get("kernels")),
        "load": read_load(answer.get("load")),
        "together": read_together(answer.get("together")),
    }
    found = judge_gpus([trial], device="cuda", changes={}, links={"0-1": "NV12"})
    return json.dumps([acceptance_table.entries(found), acceptance_table.figures(trial)])


def accepted(path: Path) -> object:
    """Read the record of an acceptance, draw it, and see whether it speaks of a node."""
    record = read_acceptance(path)
    lines = acceptance_table.render(record, node="n", width=80)
    "".join(line.text for line in lines).encode()
    return why_needed(record, fingerprint([{"uuid": "GPU-0", "serial": "1"}], "580", "k"))


def diagnosed(text: str, _: Path) -> object:
    """Judge by what dcgmi printed."""
    trial: Any = {"index": 0, "kernels": KERNELS}
    return judge_gpus([trial], device="cuda", changes={}, links={}, dcgm=read_dcgm(text))


BUNDLE = Bundle("0001", (FileEntry("a/b", 300_000, "ab" * 32), FileEntry("c", 3, "cd" * 32)))


def torrent_of(bundle: Bundle) -> str:
    """Return a torrent as a node makes it, a character for each byte."""
    hashed = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, each in enumerate(bundle.entries):
            path = Path(folder, str(number))
            path.write_bytes(b"x" * each.size)
            hashed[each.path] = hash_file(path, bundle.piece_length)
    return make_torrent("m-1", bundle.entries, bundle.piece_length, hashed).decode("latin-1")


TORRENT = torrent_of(BUNDLE)


def torn(text: str, _: Path) -> object:
    """Take a torrent that another node made."""
    return torrent_roots(text.encode("latin-1", errors="replace"), "m-1", BUNDLE)


def asked(text: str, _: Path) -> object:
    """Ask root for something."""
    helper = Helper(
        run=program("InvocationID=i1\n"),
        processes=list,
        attest_now=lambda: {"done": True, "said": ""},
        uid=1,
        py_spy="py-spy",
    )
    return helper.answer(text.encode(errors="surrogateescape"), "glm-watch")


def benchmark_before(path: Path) -> object:
    """Read a report that was written before, and draw it behind another one."""
    before = read_report(path)
    is_before(before, BENCHMARK)
    return render_benchmark_page(BENCHMARK, before, BENCHMARK_PAGE)


READERS = (
    Reader("torrent", TORRENT, torn),
    Reader(
        "wheel lock",
        "b==2 \\\n --hash=sha256:22\nA_x==1+cpu --hash=sha256:33\n",
        lambda text, _: parse_lock(text),
    ),
    Reader("question to root", '{"do": "signal", "signal": "SIGTERM", "invocation": "i1"}', asked),
    Reader("benchmark before", json.dumps(BENCHMARK), in_file(benchmark_before)),
    Reader(
        "shape", json.dumps(SHAPED), in_file(lambda path: read_shape(path.parent), "config.json")
    ),
    Reader("trials of a GPU", TRIALS, trials),
    Reader("acceptance", ACCEPTED, in_file(accepted)),
    Reader("dcgmi", json.dumps(DCGM), diagnosed),
    Reader("metrics", METRICS, sample_of),
    Reader("completion", COMPLETION, lambda text, _: complete(server(text), "glm-5.2", "x")),
    Reader("served model", MODELS, lambda text, _: served_model(server(text), "glm-5.2")),
    Reader("policy", POLICY, in_file(read_policy)),
    Reader("questions", QUESTIONS, lambda text, _: quality.read_set(text, 9)),
    Reader("tune", TUNE, lambda text, _: tuned.parse_record(text, what="The record")),
    Reader("scores", SCORES, in_file(lambda path: read(list[quality.Score], path))),
    Reader("likely tokens", LIKELY, lambda text, _: answers.ask(server(text), "m", PROMPT, "s")),
    Reader("code words", SPOKEN, lambda text, _: needles.check_needles(server(text), "m", 8192)),
    Reader(
        "kept answers",
        KEPT_ANSWERS,
        deployments_of(f"{DEPLOYMENT}/answers.json", lambda known: known.answers(DEPLOYMENT)),
    ),
    Reader("api key", "# x\nVLLM_API_KEY='a b'\n", in_file(read_api_key)),
    Reader("start record", RECORD, in_file(read_record)),
    Reader("rehearsals", REHEARSALS, in_file(read_rehearsals)),
    Reader("configuration of a model", CONFIG, lambda text, _: cut_config(text)),
    Reader("unit of a deployment", EXEC, lambda text, _: exec_words(text)),
    Reader("evidence", RECORD, in_file(lambda path: read_evidence(path, "i1"))),
    Reader("readiness", RECORD, in_file(lambda path: readiness_answer(path, path, path))),
    Reader("units", UNITS, lambda text, _: unit_state(program(text), "glm-serving.service")),
    Reader("watchdog", METRICS, watched),
    Reader("answer of a host", 'glm-fleet answers: {"a": 1}', lambda text, _: answer_in(text)),
    Reader("statistics", STATISTICS, lambda text, _: describe(haproxy_of(stat=text))),
    Reader("states", SERVERS, lambda text, _: describe(haproxy_of(state=text))),
    Reader("state file", SERVERS, in_file(lambda path: is_saved(path, []))),
    Reader(
        "info", "Name: HAProxy\nUptime_sec: 7\n", lambda text, _: describe(haproxy_of(info=text))
    ),
    Reader("list of clients", LISTED, lambda text, _: parse_clients(text).text()),
    Reader("clients", CLIENTS, lambda text, _: describe(haproxy_of(glm_clients=text))),
    Reader("front doors", DOORS, lambda text, _: decided(text)),
    Reader(
        "chain of certificates",
        ISSUED,
        lambda text, _: (
            authority.why_new(text, ["gw01"], ISSUED_AT),
            authority.is_of(AUTHORITY, text),
            authority.is_of_a_fleet(text),
        ),
    ),
    Reader(
        "certificate",
        CERTIFICATE,
        lambda text, _: read_certificates(
            Haproxy(lambda command: "/etc/x.pem\n" if command == "show ssl cert" else text)
        ),
    ),
    Reader("old workers", WORKERS, lambda text, _: parse_old_workers(text)),
    Reader(
        "nvidia-smi -q -x",
        (NVIDIA_SMI / "h200-x2-q.xml").read_text(),
        lambda text, _: gpus_of(xml=text),
    ),
    Reader(
        "nvidia-smi --query-gpu",
        QUERY,
        lambda text, _: gpus_of(query=text),
    ),
    Reader(
        "nvidia-smi topo",
        (NVIDIA_SMI / "h200-x2-topo.txt").read_text(),
        lambda text, _: gpus_of(topo=text),
    ),
    Reader("memory in use", "0, 7\n1, 81000\n", lambda text, _: memory_in_use(program(text))),
    Reader("kernel log", KERNEL, kernel_log),
    Reader("tools", f"{UNITS}\nMemTotal: 7 kB\nID=debian\n7.5 8.5\n", node),
    Reader("hub", LISTING, listing),
    Reader("config", MODEL_CONFIG, lambda text, _: read_config(text, "config.json")),
    Reader("header of a shard", SHARD_HEADER, lambda text, _: read_header(text, "it")),
    Reader("size of a model", MODEL_SIZE, sized),
    Reader(
        "index of wheels", WHEELS, lambda text, _: read_wheels(text, "https://x/c/v/", NODE_WHEELS)
    ),
    Reader("index", INDEX, adopted),
    Reader("part", "[25, 25, 0, 7]", part),
    Reader("pins", json.dumps({"a/b@main": COMMIT}), pins),
    Reader("told", TOLD, told),
    Reader("manifest", MANIFEST, manifests),
    Reader("proven", json.dumps({"a": [1, 2, 3, "ab" * 32, "cd" * 32]}), proven),
    Reader(
        "previous",
        json.dumps({"release": "a", "model": "b"}),
        in_file(lambda path: protected_by([], path)),
    ),
    Reader(
        "recipe",
        json.dumps({"python_version": "3.12", "attention_backend": "X"}),
        in_file(lambda path: read_recipe(path.parent), "release.json"),
    ),
    Reader(
        "environment",
        json.dumps({"release": "r", "records": {"a": "ab" * 32}, "sealed_ns": 7}),
        in_file(lambda path: [is_complete(path.parent, "r"), find_damage(path.parent)], COMPLETE),
    ),
    Reader(
        "fingerprints",
        f"# x\ngpu01 256 SHA256:{'a' * 43} x (ED25519)\ngpu02,10.0.0.2 ssh-ed25519 {'A' * 68}\n",
        in_file(read_fingerprints),
    ),
    Reader("roll", ROLL, lock("roll.json")),
    Reader("held", json.dumps({"gpu02": {"by": "o", "at": "t", "reason": "r"}}), lock("held.json")),
    Reader(
        "progress",
        json.dumps({"what": "x", "done": 1, "total": 2, "rate": 1e-9}),
        lambda text, _: bar(from_json(text) or Progress("", 0, 0, 0.0)),
    ),
    Reader("agent", AGENT, agent),
    Reader("record of a host", json.dumps({"standing": "working", "notes": ["x"]}), met),
    Reader("kept report", json.dumps(KEPT), kept),
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


TRIED: dict[str, int] = dict.fromkeys(map(str, READERS), 0)


@pytest.fixture(scope="module", autouse=True)
def told_how_many() -> Iterator[None]:
    """Say how many texts were tried of each kind: none gave anything but a `FleetError`."""
    yield
    tried = {name: count for name, count in TRIED.items() if count}
    each = ", ".join(f"{name} {count}" for name, count in tried.items())
    sys.stderr.write(f"\nfuzz: {sum(tried.values())} texts, {len(tried)} readers: {each}\n")


@pytest.mark.parametrize("reader", READERS, ids=str)
def test_a_reader_refuses_or_reads_one_wrong_value(reader: Reader, tmp_path: Path) -> None:
    # What is right is read; what is wrong may be refused.
    reader.read(reader.good, tmp_path)
    # All of them where the text is short, else some from everywhere in it.
    steps = max(1, sum(1 for _ in one_wrong(reader.good)) // MOST_TRIES)
    for text in itertools.islice(one_wrong(reader.good), 0, None, steps):
        TRIED[str(reader)] += 1
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
    text = data.draw(damaged(reader.good))
    TRIED[str(reader)] += 1
    with contextlib.suppress(FleetError):
        reader.read(text, tmp_path)
