# SPDX-License-Identifier: Apache-2.0
"""One lab fleet for all fleet tests, and how a client or an operator looks at it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from lab.settings import BRIDGE, NETNS_PREFIX, STATE, VETH_PREFIX

ROOT = Path(__file__).resolve().parents[2]
INVENTORY = ROOT / "inventory/lab"
_RECAP = re.compile(r"^(\S+)\s+: ok=(\d+)\s+changed=(\d+)\s+unreachable=(\d+)\s+failed=(\d+)", re.M)
_STARTED = time.monotonic()


LOGS = ROOT / "build/fleet-test"


def keep(what: str, output: str) -> None:
    """Write down all that a command said: an assertion shows only its end."""
    LOGS.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^A-Za-z0-9]+", "-", what).strip("-")[:60]
    (LOGS / f"{time.monotonic() - _STARTED:06.0f}-{name}.log").write_text(output)


def say(text: str) -> None:
    """Print a line with the time since the tests began: these tests take minutes."""
    sys.stderr.write(f"[{time.monotonic() - _STARTED:6.0f} s] {text}\n")
    sys.stderr.flush()


def wait_until(true: Callable[[], bool], otherwise: str, seconds: float = 240) -> None:
    """Wait until a condition holds; an AssertionError says ``otherwise`` after the time."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"{otherwise} within {seconds:.0f} s"
        time.sleep(0.3)


# One fleet for all: it comes to life in the first file, and the last ones take it down.
FIRST = ("test_site", "test_inside", "test_accept", "test_upgrade", "test_answers",
         "test_endpoints", "test_mending", "test_health", "test_model", "test_swarm")  # fmt: skip
LAST = ("test_before", "test_lab")


def place(stem: str) -> tuple[int, str]:
    """Return where a file stands in the order; one that is not named stands between the two."""
    if stem in FIRST:
        return FIRST.index(stem), stem
    return len(FIRST) + (1 + LAST.index(stem) if stem in LAST else 0), stem


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the files in their order, and the tests of a file as they stand."""
    items.sort(key=lambda item: place(item.path.stem))


# Processes that outlived a controller, each pinned so that its number stands for nobody else.
_ORPHANS: list[int] = []


def children(pid: int) -> list[int]:
    """Return the children of a process, and theirs."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found += [child, *children(child)]
    return found


def kill_controller(process: subprocess.Popen[str]) -> None:
    """SIGKILL a playbook.

    Ansible's workers have sessions of their own. They go on, as they do for an operator, and
    then wait for ever for the one that is gone: they are ended when the tests are.
    """
    for pid in children(process.pid):
        with contextlib.suppress(ProcessLookupError):
            _ORPHANS.append(os.pidfd_open(pid))
    os.killpg(process.pid, signal.SIGKILL)


def end_orphans() -> None:
    """End what the killed controllers left."""
    while _ORPHANS:
        handle = _ORPHANS.pop()
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(handle, signal.SIGKILL)
        os.close(handle)


@dataclass(frozen=True)
class Run:
    """What one command said."""

    rc: int
    output: str

    def recap(self) -> dict[str, dict[str, int]]:
        """Return {host: {ok, changed, unreachable, failed}} of a playbook's last lines."""
        keys = ("ok", "changed", "unreachable", "failed")
        return {
            host: dict(zip(keys, map(int, numbers)))
            for host, *numbers in _RECAP.findall(self.output)
        }

    @property
    def changed(self) -> dict[str, int]:
        """Hosts with changes, and how many."""
        return {host: each["changed"] for host, each in self.recap().items() if each["changed"]}


def assert_short(run: Run, most: int) -> None:
    """See that an operator can read the whole of a run: fewer lines than ``most``."""
    lines = run.output.splitlines()
    say(f"{len(lines)} lines were shown, {most} are too many")
    assert len(lines) < most, run.output


class Fleet:
    """The lab fleet, driven as an operator does and asked as a client does.

    ``root`` is the checkout whose playbooks are run, with its own copy of the inventory.
    """

    def __init__(self, root: Path = ROOT) -> None:
        self.root = root
        hosts = yaml.safe_load((INVENTORY / "hosts.yml").read_text())["all"]["children"]
        self.addresses = {
            name: values["ansible_host"]
            for group in hosts.values()
            for name, values in group["hosts"].items()
        }
        self.nodes = sorted(hosts["gpu_nodes"]["hosts"])
        self.gateway = next(iter(hosts["gateways"]["hosts"]))
        clients = yaml.safe_load((INVENTORY / "hosts.yml").read_text())["all"]["vars"]
        self.key: str = clients["gateway_clients"][0]["keys"][0]
        self.authority = Path(clients["gateway_authority"]) / "ca.crt"
        self.bearer = {"Authorization": f"Bearer {self.key}"}

    @property
    def url(self) -> str:
        """Where clients ask. A fleet that the version before set up goes on in clear text."""
        address, scheme = self.addresses[self.gateway], "https"
        with contextlib.suppress(OSError), socket.create_connection((address, 8080), 5) as link:
            anybody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            anybody.check_hostname, anybody.verify_mode = False, ssl.CERT_NONE
            try:
                anybody.wrap_socket(link).close()
            except ssl.SSLError:
                scheme = "http"
        return f"{scheme}://{address}:8080"

    @property
    def trust(self) -> ssl.SSLContext:
        """How a client speaks TLS: it trusts the fleet's authority, and nobody else."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if self.authority.is_file():
            context.load_verify_locations(self.authority)
        return context

    def start_playbook(self, playbook: str, *arguments: str) -> subprocess.Popen[str]:
        """Start a playbook against the lab and return at once."""
        command = [
            str(ROOT / ".venv/bin/ansible-playbook"),
            "-i",
            str(self.root / "inventory/lab"),
            playbook,
            *arguments,
        ]
        environment = {**os.environ, "ANSIBLE_NOCOLOR": "1", "COLUMNS": "200"}
        return subprocess.Popen(
            command,
            cwd=self.root,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def playbook(self, playbook: str, *arguments: str) -> Run:
        """Run a playbook to its end."""
        begun = time.monotonic()
        with self.start_playbook(playbook, *arguments) as process:
            output = process.communicate(timeout=1500)[0]
        name = " ".join([playbook, *arguments])
        say(f"{name}: rc {process.returncode} after {time.monotonic() - begun:.0f} s")
        keep(name, output)
        return Run(process.returncode, output)

    def serve(self) -> None:
        """Run site.yml unless the nodes serve: a file of tests can be run alone."""
        active = "systemctl is-active --quiet glm-serving"
        if any(self.shell(node, active).rc for node in self.nodes):
            run = self.playbook("site.yml")
            assert run.rc == 0, run.output[-4000:]

    def kill_playbook_at(
        self,
        marker: str,
        playbook: str,
        *arguments: str,
        until: Callable[[], bool] = lambda: True,
    ) -> str:
        """Start a playbook and kill the controller (SIGKILL) in the middle of something.

        It is killed once it has printed ``marker`` and ``until`` holds. Returns its output.
        """
        process = self.start_playbook(playbook, *arguments)
        seen = ""
        assert process.stdout is not None
        for line in process.stdout:
            seen += line
            if marker in line:
                try:
                    wait_until(until, f"{marker!r} did not come so far")
                finally:
                    kill_controller(process)
                break
        process.wait()
        process.stdout.close()
        say(f"{playbook}: killed at {marker!r}")
        keep(f"{playbook} killed", seen)
        return seen

    def ssh(self, host: str) -> list[str]:
        """Return the command that logs in to a host as Ansible does."""
        variables = yaml.safe_load((INVENTORY / "hosts.yml").read_text())["all"]["vars"]
        return [
            "ssh",
            "-i",
            variables["ansible_ssh_private_key_file"],
            *variables["ansible_ssh_common_args"].split(),
            f"{variables['ansible_user']}@{self.addresses[host]}",
        ]

    def shell(self, host: str, script: str) -> Run:
        """Run a script as root on a host, over the SSH that Ansible uses."""
        done = subprocess.run(
            [*self.ssh(host), "sudo bash -s"],
            input=script,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        return Run(done.returncode, done.stdout + done.stderr)

    def chat(
        self, text: str = "Hello", *, stream: bool = False, tokens: int = 16, timeout: float = 60
    ) -> Answer:
        """Ask the gateway as a client: status, node that answered, events of the stream."""
        body: dict[str, Any] = {
            "model": "glm-5.2",
            "messages": [{"role": "user", "content": text}],
            "max_tokens": tokens,
            "temperature": 0,
            "stream": stream,
        }
        request = urllib.request.Request(
            f"{self.url}/v1/chat/completions",
            data=json.dumps(body).encode(),
            # A conversation of its own: those that begin alike go to the same node.
            headers={
                "Content-Type": "application/json",
                "X-Session-Id": uuid.uuid4().hex,
                **self.bearer,
            },
        )
        arrivals: list[float] = []
        lines: list[str] = []
        with urllib.request.urlopen(request, timeout=timeout, context=self.trust) as answer:
            for line in answer:
                if line.strip():
                    arrivals.append(time.monotonic())
                    lines.append(line.decode().strip())
            headers = {key.lower(): value for key, value in answer.headers.items()}
            return Answer(answer.status, headers, lines, arrivals)


@dataclass(frozen=True)
class Answer:
    """What a client got."""

    status: int
    headers: Mapping[str, str]
    lines: list[str]
    arrivals: list[float]

    @property
    def node(self) -> str:
        """The node that answered, as the gateway names it."""
        return self.headers["x-glm-fleet-node"]


def lab(*arguments: str, check: bool = True) -> Run:
    """Run a command of the lab."""
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "lab", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    run = Run(done.returncode, done.stdout + done.stderr)
    if arguments[0] in ("up", "down"):
        say(f"lab {' '.join(arguments)}: rc {run.rc} after {time.monotonic() - begun:.0f} s")
    assert not check or run.rc == 0, run.output
    return run


def lab_remains() -> list[str]:
    """Name everything that a lab fleet could leave on this machine."""
    remains = [
        line.split()[1]
        for line in Path("/proc/self/mounts").read_text().splitlines()
        if f"{STATE}/" in line or NETNS_PREFIX in line
    ]
    for command in (["ip", "netns"], ["ip", "-brief", "link"]):
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        names = (NETNS_PREFIX, VETH_PREFIX, f"{BRIDGE} ")
        remains += [line for line in output.splitlines() if any(name in line for name in names)]
    for process in Path("/proc").iterdir():
        if not process.name.isdigit() or int(process.name) == os.getpid():
            continue
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        line = b" ".join(words).decode(errors="replace")
        if f"{STATE}/" in line:
            remains.append(f"pid {process.name}: {line[:100]}")
    return remains


@pytest.fixture(scope="session")
def fleet() -> Iterator[Fleet]:
    """A fresh lab fleet of three nodes and a gateway.

    With GLM_FLEET_KEEP=1 the one that is up is used and left, for work on a single test.
    """
    if os.environ.get("GLM_FLEET_KEEP") == "1":
        yield Fleet()
        end_orphans()
        return
    lab("down")
    lab("up", "--nodes", "3")
    try:
        yield Fleet()
    finally:
        end_orphans()
        lab("down")
