# SPDX-License-Identifier: Apache-2.0
"""Moving an artifact to N nodes: ours and rsync's, over links of a given rate, as root.

GLM_FLEET_BENCH_BYTES and GLM_FLEET_BENCH_RATE (bits per second) choose other sizes: 2 GB at
200 Mbit/s is what docs/distribution.md shows. Links and not processors have to be the limit.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from glm_fleet.artifact import FileEntry, Manifest, Store
from glm_fleet.torrent import bundles

from .conftest import REPORT, ROOT, Record
from .links import Node, Swarm, make_artifact, network
from .plot import Line, svg

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root for network namespaces")

BYTES = int(os.environ.get("GLM_FLEET_BENCH_BYTES", "256000000"))
RATE = int(os.environ.get("GLM_FLEET_BENCH_RATE", "100000000"))
COUNTS = (1, 2, 4, 7)
CONTEXT = f"{BYTES / 1e6:.0f} MB in 12 shards, {RATE / 1e6:.0f} Mbit/s"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Manifest]]:
    """The folder of node 0, which has everything, and the manifest."""
    folder = tmp_path_factory.mktemp("artifact")
    manifest = make_artifact(folder / "node0/artifacts", BYTES)
    yield folder, manifest
    shutil.rmtree(folder)


@contextlib.contextmanager
def running(swarm: Swarm, **options: float) -> Iterator[None]:
    """Have the agents up while the block lasts, and clean receivers after it."""
    swarm.start(**options)  # type: ignore[arg-type]
    try:
        yield
    finally:
        swarm.stop()
        for node in swarm.nodes[1:]:
            shutil.rmtree(swarm.folder / node.name, ignore_errors=True)


def floor(manifest: Manifest) -> float:
    """Seconds that one link takes for the bytes alone."""
    return manifest.bytes * 8 / RATE


def by_swarm(folder: Path, manifest: Manifest, count: int) -> float:
    with network(count + 1, RATE) as nodes:
        swarm = Swarm(nodes, manifest, folder)
        with running(swarm):
            begun = time.monotonic()
            swarm.wait()
            return time.monotonic() - begun


def by_rsync(folder: Path, manifest: Manifest, count: int) -> float:
    source = Store(folder / "node0/artifacts").published_path("model", manifest.id)
    config = folder / "rsyncd.conf"
    config.write_text(
        f"use chroot = no\nuid = root\ngid = root\npid file = {folder}/rsyncd.pid\n"
        f"[artifact]\npath = {source}\n"
    )
    (folder / "rsyncd.pid").unlink(missing_ok=True)
    with network(count + 1, RATE) as nodes:
        serve = ["rsync", "--daemon", "--no-detach", f"--config={config}", "--port=8730"]
        daemon = nodes[0].start(*serve)
        try:
            time.sleep(1)
            url = f"rsync://{nodes[0].address}:8730/artifact/"
            begun = time.monotonic()
            receivers = [
                node.start("rsync", "--archive", "--whole-file", url, f"{folder}/{node.name}/")
                for node in nodes[1:]
            ]
            assert [each.wait(3600) for each in receivers] == [0] * count
            return time.monotonic() - begun
        finally:
            daemon.terminate()
            daemon.wait()
            for node in nodes[1:]:
                shutil.rmtree(folder / node.name, ignore_errors=True)


def test_one_source_to_many(artifact: tuple[Path, Manifest], record: Record) -> None:
    folder, manifest = artifact
    least = floor(manifest)
    ours = {}
    for count in COUNTS:
        ours[count] = by_swarm(folder, manifest, count) / least
        record(
            f"artifact_to_{count}", ours[count], goal=1.12, unit="times the link", context=CONTEXT
        )
    if shutil.which("rsync") is None:
        pytest.skip("rsync is not here: nothing to compare with")
    theirs = {count: by_rsync(folder, manifest, count) / least for count in COUNTS}
    record(
        "artifact_against_rsync",
        ours[7] / theirs[7],
        goal=0.2,
        unit="times parallel rsync to 7 nodes",
        context=CONTEXT,
    )
    REPORT.with_name("distribution.svg").write_text(
        svg(
            f"Time to bring an artifact to N nodes ({CONTEXT})",
            "nodes",
            "times what one link takes for one copy",
            [
                Line("parallel rsync from the source", "#b3541e", theirs),
                Line("glm-fleet", "#1e6fb3", ours),
            ],
        )
    )


SERVER = """
import functools, http.server, sys
handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=sys.argv[1])
handler.log_message = None
http.server.ThreadingHTTPServer(("0.0.0.0", 8800), handler).serve_forever()
"""

FETCH = """
import json, shutil, sys, urllib.request
from pathlib import Path
from glm_fleet.artifact import FileEntry, Store, parse_manifest
job = json.load(sys.stdin)
manifest = parse_manifest(job["manifest"])
store = Store(Path(job["root"]))
parts = store.work_path("model", manifest.id)
parts.mkdir(parents=True, exist_ok=True)
for entry in (FileEntry(**each) for each in job["entries"]):
    part = parts / "part"
    with urllib.request.urlopen(f"{job['url']}/{entry.path}") as answer, part.open("wb") as sink:
        shutil.copyfileobj(answer, sink, 1 << 20)
    assert store.receive(manifest, entry, part) == entry.sha256
"""


def from_hub(folder: Path, manifest: Manifest, fetchers: int, hub_rate: int) -> float:
    """Bring what a hub has to four nodes, of which the first ones fetch a share each."""
    source = Store(folder / "node0/artifacts").published_path("model", manifest.id)
    with network(5, RATE) as nodes:
        hub, *receivers = nodes
        hub.limit(hub_rate)
        served = hub.start(sys.executable, "-c", SERVER, str(source), stderr=subprocess.DEVNULL)
        swarm = Swarm(receivers, manifest, folder)
        parts = bundles(manifest)
        processes = []
        try:
            with running(swarm):
                time.sleep(1)
                begun = time.monotonic()
                for number, node in enumerate(receivers[:fetchers]):
                    entries: list[FileEntry] = [
                        entry for part in parts[number::fetchers] for entry in part.entries
                    ]
                    fetch = node.start(
                        sys.executable,
                        "-B",
                        "-c",
                        FETCH,
                        stdin=subprocess.PIPE,
                        env={**os.environ, "PYTHONPATH": str(ROOT / "module_utils")},
                    )
                    job = {
                        "manifest": manifest.as_dict(),
                        "root": str(swarm.root(node)),
                        "entries": [vars(entry) for entry in entries],
                        "url": f"http://{hub.address}:8800",
                    }
                    assert fetch.stdin is not None
                    fetch.stdin.write(json.dumps(job).encode())
                    fetch.stdin.close()
                    processes.append(fetch)
                swarm.wait()
                assert [each.wait(10) for each in processes] == [0] * fetchers
                return time.monotonic() - begun
        finally:
            served.terminate()
            served.wait()
            shutil.rmtree(folder / receivers[0].name, ignore_errors=True)


def test_from_the_hub(artifact: tuple[Path, Manifest], record: Record) -> None:
    folder, manifest = artifact
    one = from_hub(folder, manifest, 1, RATE) / floor(manifest)
    record("artifact_hub_one_uplink", one, goal=1.15, unit="times the uplink", context=CONTEXT)
    # Each fetcher gets a quarter of the bytes at its own rate; the links among them are as fast.
    four = from_hub(folder, manifest, 4, 4 * RATE) / (floor(manifest) / 4)
    record(
        "artifact_hub_four_uplinks",
        four,
        goal=1.35,
        unit="times four uplinks",
        context=f"{CONTEXT}; a node's link carries the hub's share and the other nodes'",
    )


SERVICE = """
import http.server, time
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        time.sleep(0.03)
        body = bytes(2000)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_): pass
http.server.ThreadingHTTPServer(("0.0.0.0", 8800), Handler).serve_forever()
"""

CLIENT = """
import http.client, json, sys, time
link = http.client.HTTPConnection(sys.argv[1], 8800)
taken = []
for _ in range(300):
    begun = time.monotonic()
    link.request("GET", "/")
    link.getresponse().read()
    taken.append(time.monotonic() - begun)
print(json.dumps(taken))
"""


def p95(client: Node, service: Node) -> float:
    command = [sys.executable, "-c", CLIENT, service.address]
    process = client.start(*command, stdout=subprocess.PIPE)
    taken = json.loads(process.communicate(timeout=300)[0])
    return statistics.quantiles(taken, n=20)[18]


def test_a_service_beside_the_swarm(artifact: tuple[Path, Manifest], record: Record) -> None:
    folder, manifest = artifact
    with network(4, RATE) as nodes:
        *workers, client = nodes
        service = workers[1].start(sys.executable, "-c", SERVICE)
        swarm = Swarm(workers, manifest, folder)
        try:
            time.sleep(1)
            alone = p95(client, workers[1])
            with running(swarm, rate_limit=RATE // 8 // 4):
                carry = threading.Thread(target=lambda: swarm.wait(900))
                carry.start()
                time.sleep(2)
                beside = p95(client, workers[1])
                moved = swarm.last[workers[1].name]["received"]
                carry.join(0.1)
                assert carry.is_alive() and moved, "it has to be measured while bytes move"
                for node in workers[1:]:
                    swarm.last[node.name]["standing"] = "published"
        finally:
            service.terminate()
            service.wait()
    record(
        "artifact_service_latency",
        beside / alone,
        goal=1.2,
        unit="times the p95 without",
        context=f"requests of 30 ms, swarm limited to a quarter of {RATE / 1e6:.0f} Mbit/s",
    )


def test_nothing_to_do(tmp_path: Path, record: Record) -> None:
    """The second run, on three lab hosts."""

    def run(*words: str) -> float:
        begun = time.monotonic()
        subprocess.run(
            [str(Path(sys.executable).with_name(words[0])), *words[1:]],
            cwd=ROOT,
            check=True,
            capture_output=True,
        )
        return time.monotonic() - begun

    from lab.settings import ALL_HOSTS, INVENTORY

    if INVENTORY.exists():
        pytest.skip("a lab fleet is up")
    run("python", "-m", "lab", "up", "--nodes", "3")
    try:
        place = "srv/bench"
        root = ALL_HOSTS["gpu01"].root / place
        manifest = make_artifact(root, 10_000_000)
        for name in ("gpu02", "gpu03"):
            shutil.copytree(root, ALL_HOSTS[name].root / place)
        offer = tmp_path / "offer.json"
        described = {"kind": "model", "id": manifest.id, "path": "", "push": False}
        offer.write_text(json.dumps({**described, "manifest": manifest.as_dict()}))
        inventory = ["-i", "inventory/lab"]
        said = ["-e", f"distribute_offer={offer}", "-e", f"artifact_root=/{place}"]
        play = ["ansible-playbook", *inventory, "tests/fleet/playbooks/distribute.yml", *said]
        ping = ["ansible", *inventory, "gpu_nodes", "-m", "ping"]
        run(*ping)
        ratios = [run(*play) / run(*ping) for _ in range(5)]
    finally:
        run("python", "-m", "lab", "down")
    record(
        "artifact_nothing_to_do",
        statistics.median(ratios),
        goal=2,
        unit="times ansible ping",
        context="3 lab hosts, median of 5",
    )
