# SPDX-License-Identifier: Apache-2.0
"""The daemons of a node as systemd really runs them: who they are, and what they reach.

The engine is a program that hangs as an engine does; everything else is as on a node.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from glm_fleet.artifact.store import Store
from glm_fleet.transfer.control import unit_command, untouchable

from tests.container import Machine, booted, missing
from tests.rendering import render

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "-")

ROOT = Path(__file__).resolve().parents[2]
UNITS = "etc/systemd/system"
DAEMONS = {"glm-sentry": "glm-sentry", "glm-watch": "glm-watch"}
# A server whose figures stand still while somebody waits, once told to hang, and a program that
# reads stacks.
ENGINE = r"""#!/usr/bin/python3
import http.server, os, socketserver
TEXT = 'vllm:num_requests_running{engine="0"} %d\nvllm:num_requests_waiting{engine="0"} 0\n'
TEXT += 'vllm:iteration_tokens_total_count{engine="0"} 7\n'
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        text = TEXT % os.path.exists("/tmp/hangs") if self.path == "/metrics" else "{}"
        self.wfile.write(text.encode())
    def log_message(self, *_): pass
class Server(socketserver.ThreadingMixIn, http.server.HTTPServer): pass
Server(("127.0.0.1", 8000), Handler).serve_forever()
"""
PY_SPY = '#!/bin/sh\necho "stack of $3, read by $(id -un)"; cat /proc/$3/maps | head -1\n'
SERVING = """[Service]
User=glm
ExecStart=/usr/bin/python3 /opt/engine/vllm serve
Restart=always
RestartSec=1
"""
POLICY = {"port": 8000, "served_model_name": "m", "required": ["x"], "forbidden": []}


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    folder = tmp_path_factory.mktemp("rendered")
    render(folder, "common", ["glm-helper.socket", "glm-helper@.service"])
    render(folder, "serving", ["glm-sentry.service"], roles=["common", "artifact"])
    watched = {"health_stall_timeout": 6, "health_stall_restarts": 2}
    render(folder, "health", ["glm-watch.service"], roles=["common"], variables=watched)
    with booted(tmp_path_factory.mktemp("machine")) as machine:
        library = machine.root / "opt/glm-fleet/lib/glm_fleet"
        shutil.copytree(ROOT / "module_utils/glm_fleet", library, ignore=lambda *_: {"__pycache__"})
        files = {
            "opt/engine/vllm": ENGINE,
            "opt/glm-fleet/bin/py-spy": PY_SPY,
            "etc/glm-fleet/attestation.json": json.dumps(POLICY),
            "etc/glm-fleet/serving.env": "VLLM_API_KEY=secret\n",
            # An incident that an earlier version left, as root.
            "var/lib/glm-fleet/incidents/2026-01-01T00-00-00Z/facts.json": "{}\n",
            f"{UNITS}/glm-serving.service": SERVING,
            **{f"{UNITS}/{path.name}": path.read_text() for path in folder.glob("glm-*")},
        }
        for name, text in files.items():
            path = machine.root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            path.chmod(0o755 if text.startswith("#!") else 0o644)
        machine.shell(
            """
            groupadd --system glm-helper
            for user in glm glm-sentry glm-watch; do
              useradd --system --no-create-home --shell /usr/sbin/nologin $user
            done
            chown root:glm /etc/glm-fleet/serving.env; chmod 0640 /etc/glm-fleet/serving.env
            mkdir -m 0700 /etc/glm-fleet/deployments
            systemctl daemon-reload
            systemctl start glm-helper.socket glm-sentry glm-serving
            """
        )
        yield machine


def ask(node: Machine, user: str, **question: object) -> str:
    """Ask the helper as a user does that has its group."""
    code = (
        "import socket,sys; s=socket.socket(socket.AF_UNIX); s.connect('/run/glm-fleet/helper'); "
        "s.sendall(sys.argv[1].encode()+b'\\n'); print(s.makefile().readline())"
    )
    words = f"/usr/bin/python3 -c \"{code}\" '{json.dumps(question)}'"
    return node.shell(f"setpriv --reuid={user} --regid=glm-helper --clear-groups {words} 2>&1",
                      check=False)  # fmt: skip


def test_each_daemon_is_itself_and_has_no_right_of_root(node: Machine) -> None:
    node.shell("systemctl start glm-watch")
    for unit, user in DAEMONS.items():
        pid = node.shell(f"systemctl show --value --property=MainPID {unit}")
        node.wait(f"grep --text glm_fleet /proc/{pid}/cmdline")
        status = node.shell(f"cat /proc/{pid}/status")
        assert node.shell(f"ps -o user:20= -p {pid}") == user
        for kind in ("CapPrm", "CapEff", "CapBnd", "CapAmb"):
            assert re.search(rf"{kind}:\s+0+$", status, re.MULTILINE), status
        # What it may write, in its own view of the disk.
        probe = "for f in /etc/glm-fleet /opt/glm-fleet /run/glm-fleet /var/lib/glm-fleet /srv; do "
        probe += "touch $f/probe 2>/dev/null && echo $f; done; true"
        written = node.shell(f"nsenter --target={pid} --mount runuser -u {user} -- sh -c '{probe}'")
        assert written == ""


def test_the_kernel_decides_who_has_root_do_what(node: Machine) -> None:
    for user, question in (
        ("glm", {"do": "signal", "signal": "SIGKILL"}),
        ("glm-sentry", {"do": "signal", "signal": "SIGKILL"}),
        ("glm-watch", {"do": "attest"}),
    ):
        assert "for somebody else" in ask(node, user, **question)
    # Who is not in the group reaches nothing.
    outside = node.shell("setpriv --reuid=glm --regid=glm --clear-groups /usr/bin/python3 -c "
                         "\"import socket; socket.socket(1).connect('/run/glm-fleet/helper')\"",
                         check=False)  # fmt: skip
    assert "PermissionError" in outside
    answer = json.loads(ask(node, "glm-sentry", do="attest"))
    assert answer["done"] is False
    assert "takes no requests" in answer["said"]


def test_a_hung_engine_is_taken_out_told_of_and_ended(node: Machine) -> None:
    node.shell("systemctl stop glm-watch; systemctl restart glm-serving")
    invocation = node.shell("systemctl show --value --property=InvocationID glm-serving")
    note = json.dumps({"invocation": invocation})
    node.shell(f"cd /run/glm-fleet; echo '{note}' | tee serving.json > attested.json")
    hear = "python3 -c \"import socket; print(socket.create_connection(('127.0.0.1', 8002))"
    hear += '.makefile().readline().strip())"'
    assert node.shell(hear) == "up"
    node.shell("systemctl start glm-watch")
    node.shell("touch /tmp/hangs")
    node.wait(f"grep {invocation} /run/glm-fleet/watch/stalled")
    assert node.shell(hear) == "down #the engine makes no progress"
    node.wait(f"test $(systemctl show --value --property=InvocationID glm-serving) != {invocation}")
    kept = node.shell("cat /var/lib/glm-fleet/incidents/20*/stack-*")
    assert "read by root" in kept
    assert "r--p" in kept or "r-xp" in kept, "root read the memory of the engine's process"
    owners = node.shell("stat -c %U:%a /var/lib/glm-fleet/incidents /var/lib/glm-fleet/incidents/*")
    assert {line.split(":")[0] for line in owners.splitlines()} == {"glm-watch"}
    assert owners.splitlines()[0] == "glm-watch:750"
    said = node.shell("journalctl --unit=glm-watch --output=cat")
    assert "restarting glm-serving.service" in said
    told = node.shell("cat /run/glm-fleet/sentry/told.json")
    assert json.loads(told) == {"127.0.0.1": "down"}


def test_the_swarm_changes_nothing_that_is_published(node: Machine) -> None:
    store = Store(node.root / "srv/a")
    made = []
    for kind, text in (("release", "a"), ("model", "b"), ("model", "c")):
        folder = node.root / f"srv/made-{text}"
        folder.mkdir()
        (folder / "a").write_text(text)
        made.append(store.adopt(folder, kind=kind, slug=text, provenance={}))
    places = {each.id: store.published_path(each.kind, each.id) for each in made}
    other, release, own = (places[made[number].id] for number in (1, 0, 2))
    # What is right is read alone; what is not known to be right can be moved back.
    assert untouchable(store, made[2]) == [release, other, own]
    (own / "a").write_text("x")
    assert untouchable(store, made[2]) == [release, other]
    staging = node.root / "srv/a/.staging/model/m-3"
    staging.mkdir(parents=True)
    (staging / "a").write_text("new")
    fixed = [Path("/") / each.relative_to(node.root) for each in (release, other)]
    job = Path("/run/glm-fleet/swarm/job.json")
    command = unit_command(job, Path("/srv/a"), "/usr/bin/python3", "/lib", ["::1"], fixed)
    del command[command.index("/usr/bin/python3") :]
    fixed_words = " ".join(map(str, fixed))
    probe = f"""cd /srv/a; for each in {fixed_words} model/{own.name} .staging/model/m-3; do
        echo other > $each/a && echo $each; done
        rm -r {fixed_words}; mv {fixed_words} .staging/
        mv .staging/model/m-3 model/ && echo published"""
    node.shell("mkdir -p /run/glm-fleet/swarm; touch /run/glm-fleet/swarm/job.json")
    words = [*command, "--wait", "--pipe", "/bin/sh", "-c", probe]
    words = [each for each in words if "StandardInput" not in each and each != "--collect"]
    said = node.shell(shlex.join(words), check=False)
    assert (release / "a").read_text() == "a", said
    assert (other / "a").read_text() == "b", said
    printed = [line for line in said.splitlines() if ":" not in line]
    assert printed == [f"model/{own.name}", ".staging/model/m-3", "published"], said


def test_how_exposed_they_are_as_they_run(node: Machine) -> None:
    node.shell("systemctl start glm-watch glm-sentry")
    for unit in ("glm-sentry.service", "glm-watch.service", "glm-helper@1.service"):
        shown = node.shell(f"systemd-analyze security --no-pager {unit}")
        found = re.search(r"Overall exposure level for \S+: ([\d.]+)", shown)
        assert found, shown
        sys.stderr.write(f"\n{unit}: {found[1]}\n")
        assert float(found[1]) <= 2.5
