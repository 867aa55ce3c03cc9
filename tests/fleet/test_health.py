# SPDX-License-Identifier: Apache-2.0
"""Health of the lab fleet once it serves: every fault is named, and a hung engine comes back."""

from __future__ import annotations

import html
import json
import shlex
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from .conftest import INVENTORY, ROOT, Fleet, Run, lab, say, wait_until

pytestmark = [pytest.mark.fleet, pytest.mark.long]

VICTIM = "gpu02"
HEALTH = ("playbooks/health.yml", "-e", "health_canary_timeout=8", "-e", "ansible_ssh_timeout=5")
STALL_S = 20

ENGINE = "pgrep -f '^VLLM::EngineCore'"
INVOCATION = "systemctl show -P InvocationID glm-serving"
# Python of the modules, and of nothing that serves.
CLOCK = "/usr/lib/python3/dist-packages/glm-fleet-test-clock.pth"
ARTIFACTS = "/srv/glm-fleet/artifacts"
SHARD = "$(ls /srv/glm-fleet/model/*.json | grep -v manifest.json | head -1)"


# Asks the node for one token after a long prompt, twice: as it is, and with a worker that may
# compute for so little of the time that the prompt takes forty seconds. Prints the seconds of both.
LONE_PREFILL = r"""
import json, os, pathlib, re, signal, subprocess, threading, time, urllib.request

settings = pathlib.Path("/etc/glm-fleet/deployments/current/serving.env").read_text()
key = re.search(r"^VLLM_API_KEY=(.*)$", settings, re.M)
worker = int(subprocess.check_output(["pgrep", "-f", "^VLLM::Worker"], text=True).split()[0])

def ask(salt):
    body = {"model": "glm-5.2", "prompt": [salt] + [7 + each % 90 for each in range(3900)],
            "max_tokens": 1}
    request = urllib.request.Request(
        "http://127.0.0.1:8000/v1/completions", json.dumps(body).encode(),
        {"Content-Type": "application/json",
         "Authorization": "Bearer " + (key[1].strip('"') if key else "")})
    begun = time.monotonic()
    with urllib.request.urlopen(request, timeout=110) as answer:
        answer.read()
    return time.monotonic() - begun

alone = ask(11)
took = []
asking = threading.Thread(target=lambda: took.append(ask(12)))
asking.start()
try:
    while asking.is_alive():
        os.kill(worker, signal.SIGSTOP)
        asking.join(1)
        os.kill(worker, signal.SIGCONT)
        asking.join(alone / 40)
finally:
    os.kill(worker, signal.SIGCONT)
print(json.dumps([alone, *took]))
"""


def admin_state(state: str) -> str:
    """Return a script for the gateway that sets the victim's admin state."""
    return (
        'python3 -c "import socket; s = socket.socket(socket.AF_UNIX); '
        "s.connect('/run/haproxy/admin.sock'); "
        f"s.sendall(b'set server glm_nodes/{VICTIM} state {state}\\n'); print(s.recv(999))\""
    )


@dataclass(frozen=True)
class Fault:
    """How to break the victim and mend it, and what is said then."""

    breaks: Callable[[Fleet], Any]
    mends: Callable[[Fleet], Any]
    verdict: str
    cause: str
    step: str


def on_node(breaks: str, mends: str, verdict: str, cause: str, step: str) -> Fault:
    return Fault(
        lambda fleet: fleet.shell(VICTIM, breaks),
        lambda fleet: fleet.shell(VICTIM, mends),
        verdict,
        cause,
        step,
    )


def on_gpus(arguments: str, cause: str, step: str, mends: str = "true") -> Fault:
    def mend(fleet: Fleet) -> None:
        lab("gpu", VICTIM, "--reset")
        fleet.shell(VICTIM, mends)

    return Fault(
        lambda fleet: lab("gpu", VICTIM, *arguments.split()), mend, "degraded", cause, step
    )


FAULTS = {
    "GPU lost": on_gpus("--lose 3", "GPU count: 7", "power-cycle"),
    "Xid": on_gpus(
        "--xid 79",
        "Xid 79: 1 x",
        "look up Xid 79",
        "journalctl --rotate && journalctl --vacuum-time=1ms",
    ),
    "ECC error": on_gpus("--ecc-uncorrectable 2 --index 1", "2 uncorrectable on GPU 1", "reset"),
    "row remap": on_gpus("--remap-pending on --index 5", "pending on GPU 5", "remapped"),
    "engine hung": on_node(
        f"systemctl stop glm-watch; kill -STOP $({ENGINE})",
        f"kill -CONT $({ENGINE}); systemctl start glm-watch",
        "broken",
        "the engine hangs: no answer and no step",
        "restart the service",
    ),
    "engine dead": on_node(
        f"{INVOCATION} >/tmp/start; kill -KILL $({ENGINE}); "
        "while systemctl is-active --quiet glm-serving; do sleep 0.2; done",
        f'until [ "$({INVOCATION})" != "$(cat /tmp/start)" ]; do sleep 1; done',
        "broken",
        "the engine ",
        "journalctl",
    ),
    "old release": on_node(
        "readlink /opt/glm-fleet/current >/tmp/was; "
        "ln -sfn /opt/glm-fleet/releases/vllm-newer /opt/glm-fleet/current",
        "ln -sfn $(cat /tmp/was) /opt/glm-fleet/current",
        "broken",
        "an old release still runs",
        "site.yml",
    ),
    # Under its name a new file, because the engine may have mapped the old one.
    "model truncated": on_node(
        f"f={SHARD}; mv $f /tmp/whole; head -c 1 /tmp/whole >$f",
        f"f={SHARD}; cp /tmp/whole $f",
        "degraded",
        "truncated (1 of",
        "fetches only these files again",
    ),
    "disk": on_node(
        f"mount -t tmpfs -o size=64m tmpfs {ARTIFACTS}; head -c 66000000 /dev/zero >{ARTIFACTS}/x",
        f"umount {ARTIFACTS}",
        "degraded",
        f"the disk at {ARTIFACTS} is nearly full",
        "old artifacts or logs",
    ),
    "clock": on_node(
        f"echo 'import time; time.time = (lambda now: lambda: now() + 95)(time.time)' >{CLOCK}",
        f"rm {CLOCK}",
        "degraded",
        "s ahead of ours",
        "chrony",
    ),
    "maintenance": Fault(
        lambda fleet: fleet.shell(fleet.gateway, admin_state("maint")),
        lambda fleet: fleet.shell(fleet.gateway, admin_state("ready")),
        "degraded",
        "MAINT at gw01",
        "attests and joins",
    ),
    "unreachable": Fault(
        lambda fleet: lab("power", VICTIM, "cut"),
        lambda fleet: lab("power", VICTIM, "join"),
        "unknown",
        "no answer",
        f"ping {VICTIM}",
    ),
}


def report() -> dict[str, Any]:
    data: dict[str, Any] = json.loads((ROOT / "reports/fleet.json").read_text())
    return data


def server_line(fleet: Fleet) -> dict[str, str]:
    """Return what the gateway's statistics say of the victim."""
    script = (
        'python3 -c "import socket; s = socket.socket(socket.AF_UNIX); '
        "s.connect('/run/haproxy/admin.sock'); s.sendall(b'show stat\\n'); "
        "print(b''.join(iter(lambda: s.recv(65536), b'')).decode())\""
    )
    lines = fleet.shell(fleet.gateway, script).output.splitlines()
    heading = lines[0][2:].split(",")
    row = next(line.split(",") for line in lines if line.startswith(f"glm_nodes,{VICTIM},"))
    return dict(zip(heading, row))


def wait_until_up(fleet: Fleet) -> None:
    wait_until(
        lambda: server_line(fleet)["status"] == "UP", f"{VICTIM} did not come back at the gateway"
    )


@pytest.fixture(scope="module")
def serving(fleet: Fleet) -> Iterator[Fleet]:
    """The fleet with its watch; healthy before and after."""
    fleet.serve()
    run = fleet.playbook("playbooks/watch.yml", "-e", "health_stall_timeout=600")
    assert run.rc == 0, run.output[-4000:]
    wait_until_up(fleet)
    # What happened until now is no fault of the tests.
    fleet.playbook(*HEALTH, "-e", "health_fail_on=never")
    yield fleet
    run = fleet.playbook("playbooks/watch.yml")
    assert run.rc == 0, run.output[-4000:]


def assert_named_in_all_faces(fault: Fault, run: Run) -> None:
    assert run.rc != 0
    said = [line for line in run.output.splitlines() if f"{VICTIM} is {fault.verdict}" in line]
    assert any(fault.cause in line for line in said), run.output[-5000:]
    hosts = {each["name"]: each for each in (*report()["nodes"], *report()["gateways"])}
    assert {name for name, each in hosts.items() if each["verdict"] != "healthy"} == {VICTIM}
    found = next(each for each in hosts[VICTIM]["findings"] if fault.cause in each["cause"])
    assert fault.step in found["next_step"]
    page = (ROOT / "reports/fleet.html").read_text()
    for words in (VICTIM, found["cause"], found["next_step"]):
        assert html.escape(words).replace("&#x27;", "&#39;").replace("&quot;", "&#34;") in page


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named_with_its_node_its_cause_and_the_next_step(
    serving: Fleet, name: str
) -> None:
    fault = FAULTS[name]
    fault.breaks(serving)
    try:
        run = serving.playbook(*HEALTH)
    finally:
        fault.mends(serving)
    assert_named_in_all_faces(fault, run)
    wait_until_up(serving)


def test_a_healthy_fleet_names_none(serving: Fleet) -> None:
    serving.playbook(*HEALTH, "-e", "health_fail_on=never")
    # As a module, which a host without pipelining needs, and as a program of our own.
    for pipelining in (False, True):
        run = serving.playbook(*HEALTH, "-e", f"ansible_pipelining={pipelining}", "-vvv")
        assert run.rc == 0, run.output[-4000:]
        assert ("python3 -I -" in run.output) is pipelining
        assert "as a module instead" not in run.output
    for each in (*report()["nodes"], *report()["gateways"]):
        assert (each["verdict"], each["findings"]) == ("healthy", [])
    assert "What needs attention" not in (ROOT / "reports/fleet.html").read_text()


class Clients:
    """Asks the gateway all the time, with ``count`` requests always under way."""

    def __init__(self, fleet: Fleet, count: int) -> None:
        self._fleet = fleet
        self._end = threading.Event()
        self.threads = [threading.Thread(target=self._ask, daemon=True) for _ in range(count)]

    def _ask(self) -> None:
        while not self._end.is_set():
            try:
                self._fleet.chat("Hello", tokens=64, timeout=15)
            except OSError:
                time.sleep(0.2)

    def __enter__(self) -> Clients:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for thread in self.threads:
            thread.join(20)


def test_one_long_prompt_is_no_hang(serving: Fleet) -> None:
    """A lone prefill of twice the stall timeout: nothing is answered, and the engine computes."""
    run = serving.playbook("playbooks/watch.yml", "-e", f"health_stall_timeout={STALL_S}")
    assert run.rc == 0, run.output[-4000:]
    started = serving.shell(VICTIM, INVOCATION).output
    seen: list[str] = []
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(serving.shell, VICTIM, f"python3 - <<'END'\n{LONE_PREFILL}\nEND")
        while not asked.done():
            line = server_line(serving)
            seen.append(f"{line['status']} ({line['agent_status']})")
            time.sleep(0.5)
    assert asked.result().rc == 0, asked.result().output
    alone, slowed = json.loads(asked.result().output)
    say(f"a prompt of 3,901 tokens: {alone:.1f} s, slowed down {slowed:.0f} s; {Counter(seen)}")
    assert slowed > 1.2 * STALL_S
    assert {each.split()[0] for each in seen} == {"UP"}
    assert serving.shell(VICTIM, INVOCATION).output == started


def test_a_hung_engine_comes_back_by_itself(serving: Fleet) -> None:
    run = serving.playbook("playbooks/watch.yml", "-e", f"health_stall_timeout={STALL_S}")
    assert run.rc == 0, run.output[-4000:]
    serving.shell(VICTIM, "rm -rf /var/lib/glm-fleet/incidents/*")
    busy = next(each for each in serving.nodes if each != VICTIM)
    before = serving.shell(busy, INVOCATION).output
    started = serving.shell(VICTIM, INVOCATION).output
    seen: list[str] = []

    def look() -> dict[str, str]:
        line = server_line(serving)
        seen.append(f"{line['status']} ({line['check_status']}, {line['agent_status']})")
        assert line["status"] == "UP" or line["stot"] == sent, f"routed to a hung node: {seen}"
        assert time.monotonic() - begun < 480
        time.sleep(0.5)
        return line

    with Clients(serving, 3):
        wait_until(lambda: int(server_line(serving)["scur"]) > 0, f"nobody asks {VICTIM}")
        begun = time.monotonic()
        serving.shell(VICTIM, f"kill -STOP $({ENGINE})")
        # "UP 1/2" is a server that misses health checks, and is still asked.
        while (line := server_line(serving))["status"].startswith("UP"):
            assert time.monotonic() - begun < STALL_S, "the gateway was not told first"
            time.sleep(0.5)
        told, sent = time.monotonic() - begun, line["stot"]
        while serving.shell(VICTIM, INVOCATION).output == started:
            look()
    # Three would take the processors of this machine from the start.
    with Clients(serving, 1):
        while look()["status"] != "UP":
            pass
        back = time.monotonic() - begun
        while server_line(serving)["stot"] == sent:
            assert time.monotonic() - begun < 500, "it serves again"
            time.sleep(0.5)
    say(f"hung engine: out at the gateway after {told:.0f} s, back after {back:.0f} s")
    stacks = serving.shell(VICTIM, "cat /var/lib/glm-fleet/incidents/20*/stack-*").output
    assert "VLLM::EngineCore" in stacks
    assert "Thread" in stacks
    assert serving.shell(VICTIM, "test -s /var/lib/glm-fleet/incidents/20*/journal.txt").rc == 0
    assert serving.shell(busy, INVOCATION).output == before, "a busy node is left alone"


@pytest.fixture
def webhook() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    events: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            events.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/", events
    server.shutdown()
    server.server_close()


def test_the_timer_tells_each_change_once(
    serving: Fleet, webhook: tuple[str, list[dict[str, Any]]], tmp_path: Path
) -> None:
    url, events = webhook
    unit = tmp_path / "glm-fleet-health.service"
    play = [
        {
            "hosts": "localhost",
            "connection": "local",
            "gather_facts": False,
            "tasks": [
                {
                    "include_role": {"name": "health", "tasks_from": "units"},
                    "vars": {
                        "__health_unit_dir": str(tmp_path),
                        "health_report_dir": str(tmp_path / "reports"),
                    },
                }
            ],
        }
    ]
    (tmp_path / "play.yml").write_text(json.dumps(play))
    assert serving.playbook(str(tmp_path / "play.yml")).rc == 0

    def run_timer() -> dict[str, Any]:
        text = unit.read_text().replace("\\\n", " ").replace("%S", str(tmp_path / "state"))
        environment = {"GLM_FLEET_WEBHOOK": url, "HOME": str(Path.home())}
        for line in text.splitlines():
            key, _, value = line.partition("=")
            if key == "Environment":
                environment.update(each.split("=", 1) for each in shlex.split(value))
            if key in ("ExecStart", "ExecStartPost"):
                (tmp_path / "state/glm-fleet-health").mkdir(parents=True, exist_ok=True)
                done = subprocess.run(
                    shlex.split(value), cwd=ROOT, env=environment, capture_output=True, check=False
                )
                assert done.returncode == 0, f"{value}: {done.stdout!r} {done.stderr!r}"
        data: dict[str, Any] = json.loads((tmp_path / "reports/fleet.json").read_text())
        return data

    assert INVENTORY.name in unit.read_text()
    # The first one finds what the tests before have left, the second one that it is over.
    for _ in range(2):
        run_timer()
    events.clear()
    assert run_timer()["changes"] == []
    lab("gpu", VICTIM, "--lose", "3")
    try:
        changes = run_timer()["changes"]
        assert {each["host"] for each in changes} == {VICTIM}
        assert ("verdict", "healthy", "degraded") in [
            (each["what"], each["before"], each["after"]) for each in changes
        ]
        assert run_timer()["changes"] == []
    finally:
        lab("gpu", VICTIM, "--reset")
    run_timer()
    assert [(each["host"], each["before"], each["after"]) for each in events] == [
        (VICTIM, "healthy", "degraded"),
        (VICTIM, "degraded", "healthy"),
    ]
    assert len(list((tmp_path / "state/glm-fleet-health/artifacts").iterdir())) == 6
