# SPDX-License-Identifier: Apache-2.0
"""The main job on the lab fleet, in the order in which a fleet comes to life."""

from __future__ import annotations

import http.client
import json
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping

import pytest
import yaml

from .conftest import ROOT, Fleet, Run, assert_short, lab, say, wait_until

pytestmark = pytest.mark.fleet

BARE = "ls -d /opt/glm-fleet /srv/glm-fleet /etc/glm-fleet /etc/haproxy 2>/dev/null; true"


def assert_good(run: Run) -> None:
    assert run.rc == 0, run.output[-6000:]


def test_check_mode_on_an_empty_fleet_changes_nothing(fleet: Fleet) -> None:
    assert_good(fleet.playbook("site.yml", "--check", "--diff"))
    for host in [*fleet.nodes, fleet.gateway]:
        assert fleet.shell(host, BARE).output == ""


# Each round breaks the three nodes in three ways: what is done to a node, and the words by
# which the table names it.
GPU_FAULTS = [
    {
        "gpu01": (["--lose", "3"], "GPU count"),
        "gpu02": (["--model", "NVIDIA H100 80GB HBM3"], "GPU model"),
        "gpu03": (["--compute-cap", "9.0"], "compute capability"),
    },
    {
        "gpu01": (["--mig", "on", "--index", "2"], "MIG"),
        "gpu02": (["--ecc-uncorrectable", "2", "--index", "1"], "ECC"),
        "gpu03": (["--remap-pending", "on", "--index", "5"], "row remap"),
    },
    {
        "gpu01": (["--xid", "79"], "Xid"),
        "gpu02": (["--memory-used", "1200", "--index", "0"], "GPU memory in use"),
        "gpu03": (["--driver", "470.82.01"], "driver"),
    },
]


@pytest.mark.parametrize("faults", GPU_FAULTS)
def test_preflight_names_each_fault_of_a_gpu(
    fleet: Fleet, faults: dict[str, tuple[list[str], str]]
) -> None:
    for node, (arguments, _) in faults.items():
        lab("gpu", node, *arguments)
    try:
        run = fleet.playbook("site.yml")
    finally:
        for node in faults:
            lab("gpu", node, "--reset")
            # An Xid stays in the journal of this boot; a repaired node was rebooted.
            fleet.shell(node, "journalctl --rotate && journalctl --vacuum-time=1ms")
    assert run.rc != 0
    assert run.changed == {}
    for node, (_, words) in faults.items():
        assert any(
            node in line and words.lower() in line.lower() for line in run.output.splitlines()
        ), f"{node}: {words} is not in:\n{run.output[-5000:]}"
    for host in [*fleet.nodes, fleet.gateway]:
        assert fleet.shell(host, BARE).output == ""


def test_preflight_names_a_full_disk_a_foreign_port_and_a_dead_host(fleet: Fleet) -> None:
    fleet.shell("gpu03", "mount -t tmpfs -o size=64m tmpfs /srv")
    fleet.shell(
        "gpu02",
        "systemd-run --unit=squatter --property=DynamicUser=yes python3 -m http.server 8000",
    )
    lab("power", "gpu01", "cut")
    try:
        run = fleet.playbook("site.yml", "-e", "ansible_ssh_timeout=5")
    finally:
        fleet.shell("gpu03", "umount /srv")
        fleet.shell("gpu02", "systemctl stop squatter")
        lab("power", "gpu01", "join")
    assert run.rc != 0
    assert run.changed == {}
    for words in (("gpu03", "disk"), ("gpu02", "port"), ("gpu01", "connection")):
        assert any(all(word in line for word in words) for line in run.output.splitlines()), (
            f"{words} is not in:\n{run.output[-5000:]}"
        )


def test_a_run_that_is_killed_is_continued_by_the_next(fleet: Fleet) -> None:
    artifacts = "/srv/glm-fleet/artifacts"
    begun = {
        "Move what is missing": f"ls -d {artifacts}/{{.staging/,}}{{release,model}}/* | grep -q .",
        "Build the environment of the release": "ls -A /opt/glm-fleet/releases | grep -q .",
    }
    for marker, script in begun.items():

        def until(script: str = script) -> bool:
            return fleet.shell(fleet.nodes[-1], script).rc == 0

        assert "PLAY RECAP" not in fleet.kill_playbook_at(marker, "site.yml", until=until)
    first = fleet.playbook("site.yml")
    assert_good(first)
    assert all(each["failed"] == each["unreachable"] == 0 for each in first.recap().values())


def test_the_second_run_changes_nothing(fleet: Fleet) -> None:
    second = fleet.playbook("site.yml")
    assert_good(second)
    assert set(second.recap()) >= {*fleet.nodes, fleet.gateway, "controller"}
    assert second.changed == {}
    assert_short(second, 60)


def test_check_mode_on_a_converged_fleet_finds_no_difference(fleet: Fleet) -> None:
    run = fleet.playbook("site.yml", "--check", "--diff")
    assert_good(run)
    assert run.changed == {}
    assert_short(run, 60)


def test_the_release_that_runs_was_cherry_picked_with_a_conflict(fleet: Fleet) -> None:
    for node in fleet.nodes:
        release = fleet.shell(node, "readlink -f /opt/glm-fleet/current").output.strip()
        name = release.rpartition("/")[2]
        manifest = json.loads(
            fleet.shell(node, f"cat /srv/glm-fleet/artifacts/release/{name}/manifest.json").output
        )
        provenance = manifest["provenance"]
        text = json.dumps(provenance)
        assert "vllm/model_executor/layers/sparse_attn_indexer.py" in text
        assert all(check["passed"] for check in provenance["checks"])
        assert provenance["conflicts"], "the stand-in conflicts by design"
        seen = fleet.shell(
            node,
            f"cd / && PYTHONDONTWRITEBYTECODE=1 {release}/bin/python -c '"
            "from vllm.v1.attention.backends.registry import AttentionBackendEnum as B;"
            "import vllm.model_executor.layers.sparse_attn_indexer as s;"
            'print(B.TRITON_MLA_SPARSE.get_class().get_name(), hasattr(s, "SparseAttnIndexer"))\''
            " 2>/dev/null | tail -1",
        )
        assert seen.output.split() == ["TRITON_MLA_SPARSE", "True"], seen.output


def test_nothing_of_the_service_runs_as_root(fleet: Fleet) -> None:
    for node in fleet.nodes:
        user = fleet.shell(node, "ps -o user= -p $(systemctl show -P MainPID glm-serving)")
        assert user.output.strip() == "glm"
        mode = fleet.shell(node, "stat -c '%a %U:%G' /etc/glm-fleet/serving.env").output
        assert mode.strip() == "640 root:glm"


def test_the_gateway_streams_tokens_from_each_node(fleet: Fleet) -> None:
    seen: dict[str, list[float]] = {}
    for _ in range(30):
        begun = time.monotonic()
        answer = fleet.chat("Tell me a story", stream=True, tokens=200)
        assert answer.status == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.lines[-1] == "data: [DONE]"
        events = [json.loads(line[len("data: ") :]) for line in answer.lines[:-1]]
        assert sum(bool(each["choices"][0]["delta"].get("content")) for each in events) >= 3
        first, last = answer.arrivals[0] - begun, answer.arrivals[-1] - begun
        seen.setdefault(answer.node, []).append(first / last)
        if len(seen) == len(fleet.nodes):
            break
    assert sorted(seen) == fleet.nodes
    # A gateway that buffers delivers the first token together with the last.
    assert all(min(shares) < 0.5 for shares in seen.values()), seen


def test_curl_gets_events_as_anybody_would(fleet: Fleet) -> None:
    body = '{"model":"glm-5.2","prompt":"Hello","max_tokens":4,"stream":true}'
    done = subprocess.run(
        ["curl", "-sN", "--cacert", fleet.authority, f"{fleet.url}/v1/completions",
         "-H", "Content-Type: application/json", "-H", f"Authorization: Bearer {fleet.key}",
         "-d", body],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert done.stdout.count("data: ") >= 4
    assert done.stdout.rstrip().endswith("data: [DONE]")


def status(fleet: Fleet, method: str, path: str, headers: Mapping[str, str]) -> int:
    """Ask the gateway for a path as it is written, and return the status."""
    host, _, port = fleet.url.removeprefix("https://").partition(":")
    door = http.client.HTTPSConnection(host, int(port), timeout=60, context=fleet.trust)
    try:
        door.request(method, path, b"{}" if method != "GET" else None, dict(headers))
        return door.getresponse().status
    finally:
        door.close()


def test_clients_trust_the_authority_of_the_fleet_and_nobody_else(fleet: Fleet) -> None:
    assert fleet.url.startswith("https://")
    assert status(fleet, "GET", "/v1/models", fleet.bearer) == 200
    stranger = ssl.create_default_context()
    with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
        urllib.request.urlopen(f"{fleet.url}/v1/models", context=stranger, timeout=30)
    held = fleet.shell(fleet.gateway, "stat -c '%a %U' /etc/haproxy/glm-fleet/front.pem").output
    assert held.split() == ["600", "root"]
    assert (fleet.authority.parent / "ca.key").stat().st_mode & 0o777 == 0o600


def test_of_all_that_the_engine_offers_only_listed_paths_answer(fleet: Fleet) -> None:
    """Its own application says what there is: what it has not told is tried by other tests."""
    offered = json.loads(
        fleet.shell(fleet.nodes[0], "curl -s http://127.0.0.1:8000/openapi.json").output
    )["paths"]
    routes = {f"{method.upper()} {path}" for path in offered for method in offered[path]}
    defaults = yaml.safe_load((ROOT / "roles/gateway/defaults/main.yml").read_text())
    allowed = set(defaults["gateway_paths"])
    assert {"POST /v1/chat/completions", "GET /v1/models"} <= routes & allowed
    assert len(routes - allowed) > 10, "the engine offers more than clients may use"
    for route in sorted(routes | {"GET /metrics", "GET /docs", "GET /openapi.json"}):
        method, path = route.replace("{response_id}", "resp_1").split(" ")
        without = status(fleet, method, path, {})
        assert without == (401 if route in allowed else 404), route
        if route not in allowed:
            assert status(fleet, method, path, fleet.bearer) == 404, route


def test_a_stopped_node_is_taken_out_and_requests_go_on(fleet: Fleet) -> None:
    victim, *others = fleet.nodes
    fleet.shell(victim, "systemctl stop glm-serving")
    try:
        wait_until(
            lambda: victim not in {fleet.chat().node for _ in range(4)},
            "the stopped node still gets requests",
            60,
        )
        answers = [fleet.chat() for _ in range(10)]
        assert {answer.status for answer in answers} == {200}
        assert {answer.node for answer in answers} <= set(others)
        health = fleet.playbook("playbooks/health.yml")
        assert health.rc != 0
        assert any(victim in line and "broken" in line for line in health.output.splitlines())
    finally:
        fleet.shell(victim, "systemctl start glm-serving")
    wait_until(lambda: fleet.chat().node == victim, "the node did not come back", 480)


def test_health_is_a_table_and_the_same_as_json(fleet: Fleet) -> None:
    run = fleet.playbook("playbooks/health.yml")
    assert_good(run)
    report = json.loads((ROOT / "reports/fleet.json").read_text())
    assert sorted(each["name"] for each in report["nodes"]) == fleet.nodes
    for each in report["nodes"]:
        assert each["verdict"] == "healthy"
        assert each["name"] in run.output
    say(json.dumps(report["summary"]))
