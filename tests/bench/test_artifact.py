# SPDX-License-Identifier: Apache-2.0
"""Moving an artifact to N nodes: ours and rsync's, over links of a given rate, as root.

GLM_FLEET_BENCH_BYTES and GLM_FLEET_BENCH_RATE (bits per second) choose other sizes; those of
docs/distribution.md stand there. Links and not processors have to be the limit: seven nodes that
receive, hash and give on are a lot for two cores.
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
from glm_fleet.artifact.manifest import Manifest
from glm_fleet.artifact.store import Store
from glm_fleet.transfer.torrent import shares

from .conftest import REPORT, ROOT, Record
from .links import COMMIT, Node, Swarm, make_artifact, network
from .plot import Line, svg

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root for network namespaces")

BYTES = int(os.environ.get("GLM_FLEET_BENCH_BYTES", "256000000"))
RATE = int(os.environ.get("GLM_FLEET_BENCH_RATE", "100000000"))
COUNTS = (1, 2, 4, 7)
SHARDS = 12
# What leads out of a site is narrower than what connects its nodes.
UPLINK = RATE // 4
CONTEXT = f"{BYTES / 1e6:.0f} MB in {SHARDS} shards, {RATE / 1e6:.0f} Mbit/s"
# A file travels on when it is whole, so their number matters: it is that of the model. Files
# below 64 MiB travel together, so that it holds with 5.6 GB and more only; less needs fewer.
HUB_SHARDS = int(os.environ.get("GLM_FLEET_BENCH_SHARDS", "83"))


@contextlib.contextmanager
def made(factory: pytest.TempPathFactory, shards: int) -> Iterator[tuple[Path, Manifest]]:
    """The folder of node 0, which has everything, and the manifest."""
    folder = factory.mktemp("artifact")
    yield folder, make_artifact(folder / "node0/artifacts", BYTES, shards)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Manifest]]:
    """Twelve shards, as in the lab."""
    with made(tmp_path_factory, SHARDS) as artifact:
        yield artifact


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Manifest]]:
    """As many shards as the model has."""
    with made(tmp_path_factory, HUB_SHARDS) as artifact:
        yield artifact


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
    """Return the time in units of the floor of what is moved: a quarter, as it takes so long."""
    source = Store(folder / "node0/artifacts").published_path("model", manifest.id)
    sample = folder / "sample"
    sample.mkdir(exist_ok=True)
    for shard in sorted(source.glob("*.safetensors"))[: SHARDS // 4]:
        if not (sample / shard.name).exists():
            os.link(shard, sample / shard.name)
    least = sum(each.stat().st_size for each in sample.iterdir()) * 8 / RATE
    config = folder / "rsyncd.conf"
    config.write_text(
        f"use chroot = no\nuid = root\ngid = root\npid file = {folder}/rsyncd.pid\n"
        f"[artifact]\npath = {sample}\n"
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
            return (time.monotonic() - begun) / least
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
    theirs = {count: by_rsync(folder, manifest, count) for count in COUNTS}
    record(
        "artifact_against_rsync",
        ours[7] / theirs[7],
        goal=0.2,
        unit="times parallel rsync to 7 nodes",
        context=f"{CONTEXT}; rsync with a quarter of it, each beside its own floor",
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


FETCH = """
import json, sys
from pathlib import Path
from glm_fleet.artifact import Store, parse_manifest
from glm_fleet.hub import Fetcher, HubClient, Patience, Source
from glm_fleet.progress import Meter
job = json.load(sys.stdin)
manifest = parse_manifest(job["manifest"])
source = Source("bench/model", manifest.provenance["revision"], (job["url"],))
store = Store(Path(job["root"]))
# A file of the model comes in segments; so do these, which are small.
fetcher = Fetcher(store, source, HubClient(""), Patience(60), Meter("fetching"), segment=1 << 20)
fetcher.fetch(manifest, job["files"])
"""


def make_repository(folder: Path, manifest: Manifest) -> Path:
    """Lay out what the lab's hub serves, with the files of node 0."""
    source = Store(folder / "node0/artifacts").published_path("model", manifest.id)
    repository = folder / "hub/bench/model"
    tree = repository / "revisions" / COMMIT
    tree.mkdir(parents=True, exist_ok=True)
    (repository / "refs.json").write_text(json.dumps({"main": COMMIT}))
    for entry in manifest.files:
        if not (tree / entry.path).exists():
            os.link(source / entry.path, tree / entry.path)
    return folder / "hub"


def from_hub(folder: Path, manifest: Manifest, fetchers: int) -> float:
    """Bring what a hub has to four nodes, of which the first ones fetch a share each."""
    served = make_repository(folder, manifest)
    # The hub is faster than all uplinks.
    with network(5, RATE, [8 * UPLINK, *[UPLINK] * fetchers]) as nodes:
        hub, *receivers = nodes
        serve = [sys.executable, "-m", "lab.hub", str(served), "--port", "8800"]
        server = hub.start(*serve, "--bind", hub.world_address, cwd=ROOT, stderr=subprocess.DEVNULL)
        swarm = Swarm(receivers, manifest, folder)
        shared = shares(
            manifest,
            [node.name for node in receivers[:fetchers]],
            [entry.path for entry in manifest.files],
        )
        processes = []
        try:
            with running(swarm):
                time.sleep(1)
                begun = time.monotonic()
                for node in receivers[:fetchers]:
                    fetch = node.start(
                        *(sys.executable, "-B", "-c", FETCH),
                        stdin=subprocess.PIPE,
                        env={**os.environ, "PYTHONPATH": str(ROOT / "module_utils")},
                    )
                    job = {
                        "manifest": manifest.as_dict(),
                        "root": str(swarm.root(node)),
                        "files": shared[node.name],
                        "url": f"http://{hub.world_address}:8800",
                    }
                    assert fetch.stdin is not None
                    fetch.stdin.write(json.dumps(job).encode())
                    fetch.stdin.close()
                    processes.append(fetch)
                swarm.wait(600 + 3 * manifest.bytes * 8 / UPLINK / fetchers)
                taken = time.monotonic() - begun
                assert [each.wait(10) for each in processes] == [0] * fetchers
                return taken
        finally:
            server.terminate()
            server.wait()
            shutil.rmtree(folder / receivers[0].name, ignore_errors=True)


@pytest.mark.parametrize(("fetchers", "goal"), [(1, 1.15), (4, 1.35)])
def test_from_the_hub(
    fetchers: int, goal: float, repository: tuple[Path, Manifest], record: Record
) -> None:
    folder, manifest = repository
    least = manifest.bytes * 8 / UPLINK / fetchers
    record(
        f"artifact_hub_{fetchers}_uplink{'s' * (fetchers > 1)}",
        from_hub(folder, manifest, fetchers) / least,
        goal=goal,
        unit="times the uplinks",
        context=f"{BYTES / 1e6:.0f} MB in {HUB_SHARDS} shards, {UPLINK / 1e6:.0f} Mbit/s to the "
        f"hub, {RATE / 1e6:.0f} between 4 nodes",
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
