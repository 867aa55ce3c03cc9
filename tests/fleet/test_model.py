# SPDX-License-Identifier: Apache-2.0
"""Getting the weights: what goes wrong at the hub, and what must never go wrong."""

from __future__ import annotations

import json
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from lab.model import HUB_FOLDER, main_revision
from lab.settings import (
    BRIDGE_ADDRESS,
    HUB_PORT,
    MODEL_REPOSITORY,
    SHARDS_REPOSITORY,
    UPSTREAMS,
)

from .conftest import ROOT, Fleet, Run, kill_controller, lab, wait_until

pytestmark = [pytest.mark.fleet, pytest.mark.long]

HUB_LOG = UPSTREAMS / "hub.log"
PLACE = "/srv/test-model"
TOKEN = "hf_XrnbQkTtVmZpLsWcYd0123456789"  # noqa: S105 (the lab's hub alone knows it)
FETCHER = "gpu01"
WATCH = "when-fetching"
ARTIFACTS = f"{PLACE}/artifacts"


class Hub:
    """What the lab's hub was asked since the last look."""

    def __init__(self) -> None:
        self._offset = HUB_LOG.stat().st_size

    def lines(self) -> list[str]:
        with HUB_LOG.open() as log:
            log.seek(self._offset)
            return log.read().splitlines()

    def fetched(self) -> dict[str, list[int]]:
        """{large file: where each download of it began, in bytes}."""
        found: dict[str, list[int]] = {}
        for line in self.lines():
            match = re.search(r"GET (\S+\.safetensors) bytes (\d+)-", line)
            if match:
                found.setdefault(match[1], []).append(int(match[2]))
        return found


def variables(**more: Any) -> list[str]:
    """The arguments that keep these tests out of the way of the fleet's own model."""
    values = {
        "artifact_root": ARTIFACTS,
        "artifact_library": f"{PLACE}/lib",
        "artifact_toolbox": f"{PLACE}/toolbox",
        "model_patience": 3,
        "serving_root": PLACE,
        "serving_model_link": f"{PLACE}/model",
        "serving_cache": f"{PLACE}/cache",
        **more,
    }
    return ["-e", json.dumps(values)]


def get_model(fleet: Fleet, *arguments: str, **more: Any) -> Run:
    return fleet.playbook("playbooks/model.yml", *arguments, *variables(**more))


def published(fleet: Fleet) -> list[str]:
    return fleet.shell(FETCHER, f"ls {ARTIFACTS}/model 2>/dev/null; true").output.split()


def wipe(fleet: Fleet, *nodes: str) -> None:
    """Take the artifacts away, from every node or from these."""
    for node in nodes or fleet.nodes:
        fleet.shell(node, f"rm -rf {ARTIFACTS}")


@pytest.fixture(autouse=True)
def healthy(fleet: Fleet) -> Iterator[None]:
    lab("hub", "{}")
    yield
    lab("hub", "{}")


@pytest.fixture(scope="module", autouse=True)
def tidy(fleet: Fleet) -> Iterator[None]:
    yield
    for node in fleet.nodes:
        fleet.shell(node, f"umount {PLACE}/small 2>/dev/null; rm -rf {PLACE}")


FAULTS = [
    ({"gone": ["MAIN"]}, ["The revision is not on the hub", "MAIN"]),
    ({"gated": [TOKEN]}, ["does not let us read", "HTTP 401", "no token was given"]),
    ({"too_many_requests": 99, "retry_after": 900}, ["429", "asks to wait 900 s"]),
    ({"down": True}, [f"No hub delivers {MODEL_REPOSITORY}", "model_proxy"]),
]


@pytest.mark.parametrize(("faults", "words"), FAULTS)
def test_each_fault_of_the_hub_is_one_clear_error(
    fleet: Fleet, faults: dict[str, Any], words: list[str]
) -> None:
    wipe(fleet)
    lab("hub", json.dumps(faults).replace("MAIN", main_revision()))
    run = get_model(fleet)
    assert run.rc != 0
    text = " ".join(run.output.split())
    for each in [*words, "What to do:"]:
        assert each.replace("MAIN", main_revision()) in text, run.output[-3000:]
    assert "Traceback" not in text
    assert published(fleet) == []


def test_a_token_without_access_is_refused_and_not_shown(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab("hub", json.dumps({"gated": ["another"]}))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    run = get_model(fleet)
    assert run.rc != 0
    assert "the token has no access" in " ".join(run.output.split())
    assert TOKEN not in run.output


def test_a_corrupt_file_is_named_and_only_it_is_fetched_by_the_next_run(fleet: Fleet) -> None:
    wipe(fleet)
    name = "model-00002-of-00004.safetensors"
    lab("hub", json.dumps({"corrupt": name}))
    hub = Hub()
    run = get_model(fleet)
    assert run.rc != 0
    assert f"{name}: SHA-256" in run.output
    assert len(hub.fetched()[name]) == 2
    assert published(fleet) == []
    lab("hub", "{}")
    hub = Hub()
    assert get_model(fleet).rc == 0
    assert list(hub.fetched()) == [name]


def test_a_branch_that_moves_moves_no_fleet(fleet: Fleet) -> None:
    wipe(fleet)
    assert get_model(fleet, model_revision="main").rc == 0
    before = published(fleet)
    other = next(
        path.name
        for path in (HUB_FOLDER / MODEL_REPOSITORY / "revisions").iterdir()
        if path.name != main_revision()
    )
    lab("hub", json.dumps({"refs": {"main": other}}))
    hub = Hub()
    run = get_model(fleet, model_revision="main")
    assert run.rc == 0
    assert hub.lines() == [], "a published model costs no network"
    # Also when the model itself is lost, the record of its commit stays.
    for node in fleet.nodes:
        fleet.shell(node, f"rm -rf {ARTIFACTS}/model")
    assert get_model(fleet, model_revision="main").rc == 0
    assert published(fleet) == before
    # A fetcher that lost it gets it from the other nodes.
    fleet.shell(FETCHER, f"rm -rf {ARTIFACTS}/model")
    hub = Hub()
    assert get_model(fleet, model_revision="main").rc == 0
    assert published(fleet) == before
    assert hub.fetched() == {}
    assert get_model(fleet, model_revision=other).rc == 0
    assert sorted(published(fleet)) != before


def test_a_mirror_is_asked_while_the_hub_is_away(fleet: Fleet) -> None:
    wipe(fleet)
    # The lab's hub plays the mirror; at the port beside it nobody listens.
    mirror = f"http://{BRIDGE_ADDRESS}:{HUB_PORT}"
    away = f"http://{BRIDGE_ADDRESS}:{HUB_PORT + 99}"
    run = get_model(fleet, model_endpoint=away, model_mirrors=[mirror])
    assert run.rc == 0, run.output[-3000:]
    assert len(published(fleet)) == 1


def test_retirement_makes_room_and_check_mode_tells_before(fleet: Fleet) -> None:
    (first,) = published(fleet)
    fleet.shell(FETCHER, f"ln -sfn {ARTIFACTS}/model/{first} {PLACE}/model")
    assert get_model(fleet, model_exclude=["README.md"], artifact_keep=1).rc == 0
    fleet.shell(FETCHER, f"touch -d '1 hour ago' {ARTIFACTS}/model/{first}/manifest.json")
    assert len(published(fleet)) == 2, "what is active stays"
    fleet.shell(FETCHER, f"rm {PLACE}/model")
    told = fleet.playbook("playbooks/retire.yml", "--check", "--diff", *variables(artifact_keep=1))
    assert told.rc == 0
    assert f"-model/{first}" in told.output
    assert len(published(fleet)) == 2
    assert fleet.playbook("playbooks/retire.yml", *variables(artifact_keep=1)).rc == 0
    assert first not in published(fleet)
    again = fleet.playbook("playbooks/retire.yml", *variables(artifact_keep=1))
    assert (again.rc, again.changed) == (0, {}), again.output[-3000:]


def test_a_killed_run_is_continued_within_its_files(fleet: Fleet) -> None:
    wipe(fleet)
    lab("hub", json.dumps({"rate_bytes_per_second": 2_000_000}))
    # As a node that loses power: nothing gets a chance to tidy up.
    when_fetching(fleet, ARTIFACTS, "pkill -9 -f [A]nsiballZ_hub_snapshot")
    process = fleet.start_playbook(
        "playbooks/model.yml",
        *variables(model_repository=SHARDS_REPOSITORY, model_revision="main"),
    )
    wait_for(fleet, f"! systemctl is-active --quiet {WATCH}")
    kill_controller(process)
    process.communicate()
    parts = f"{ARTIFACTS}/.staging/model/*.parts"
    sizes = fleet.shell(FETCHER, f"cd {parts} && stat -c '%n %s' *").output.split()
    have = {name: int(size) for name, size in zip(sizes[::2], sizes[1::2])}
    staged = fleet.shell(FETCHER, f"cd {ARTIFACTS}/.staging/model/*[0-9a-f] && ls").output.split()
    assert published(fleet) == []
    assert sum(have.values()) > 20_000_000
    lab("hub", "{}")
    hub = Hub()
    run = get_model(fleet, model_repository=SHARDS_REPOSITORY, model_revision="main")
    assert run.rc == 0, run.output[-3000:]
    fetched = hub.fetched()
    assert {name: [have[name]] for name in have} == {name: fetched[name] for name in have}
    assert not set(staged) & set(fetched)
    assert len(published(fleet)) == 1


def test_fetchers_share_the_files_and_they_spread_meanwhile(fleet: Fleet, tmp_path: Path) -> None:
    wipe(fleet)
    first, second, third = fleet.nodes
    more = tmp_path / "fetchers.yml"
    more.write_text(yaml.safe_dump({"fetchers": {"hosts": {first: None, second: None}}}))
    lab("hub", json.dumps({"rate_bytes_per_second": 8_000_000}))
    hub = Hub()
    play = fleet.start_playbook(
        "playbooks/model.yml",
        *("-i", str(more)),
        *variables(
            model_repository=SHARDS_REPOSITORY, model_revision="main", model_fetch_workers=1
        ),
    )
    seen: set[int] = set()
    count = f"ls {ARTIFACTS}/.staging/model/*[0-9a-f] 2>/dev/null | grep -c safetensors"
    while play.poll() is None:
        whole = int(fleet.shell(third, count).output.split()[0])
        if len(hub.fetched()) < 12:
            seen.add(whole)
        time.sleep(0.5)
    assert play.stdout is not None
    output = play.stdout.read()
    play.stdout.close()
    assert play.returncode == 0, output[-3000:]
    assert {len(starts) for starts in hub.fetched().values()} == {1}, "each byte is fetched once"
    assert len(hub.fetched()) == 12
    clients = {line.split()[0] for line in hub.lines() if "GET model-" in line}
    assert clients == {fleet.addresses[first], fleet.addresses[second]}
    assert max(seen) >= 4, "what has arrived is on the other nodes before the rest is fetched"
    models = {fleet.shell(node, f"ls {ARTIFACTS}/model").output for node in fleet.nodes}
    assert len(models) == 1


def test_a_folder_on_a_disk_is_adopted_and_not_downloaded(fleet: Fleet) -> None:
    (model,) = published(fleet)
    more = {"model_repository": SHARDS_REPOSITORY, "model_revision": "main"}
    fleet.shell(FETCHER, f"mv {ARTIFACTS}/model/{model} {PLACE}/disk; rm -rf {ARTIFACTS}")
    fleet.shell(FETCHER, f"truncate -s 5000 {PLACE}/disk/model-00003-of-00012.safetensors")
    # With the hub: its metadata decides, and only the damaged file is fetched.
    hub = Hub()
    run = get_model(fleet, model_folder=f"{PLACE}/disk", **more)
    assert run.rc == 0, run.output[-3000:]
    assert list(hub.fetched()) == ["model-00003-of-00012.safetensors"]
    assert published(fleet) == [model]
    # Without it: the manifest that lies in the folder does.
    lab("hub", json.dumps({"down": True}))
    fleet.shell(FETCHER, f"rm -rf {PLACE}/disk; mv {ARTIFACTS}/model/{model} {PLACE}/disk")
    wipe(fleet)
    hub = Hub()
    run = get_model(fleet, model_folder=f"{PLACE}/disk", **more)
    assert run.rc == 0, run.output[-3000:]
    assert hub.fetched() == {}
    assert published(fleet) == [model]
    assert "what came with the folder decides" in " ".join(run.output.split())
    # And a folder that is not what its manifest says is refused, file by file.
    wipe(fleet)
    fleet.shell(
        FETCHER,
        f"cd {PLACE}/disk && printf X | dd of=model-00005-of-00012.safetensors conv=notrunc "
        "bs=1 seek=9000000 2>/dev/null; rm model-00006-of-00012.safetensors",
    )
    run = get_model(fleet, model_folder=f"{PLACE}/disk", **more)
    assert run.rc != 0
    text = " ".join(run.output.split())
    assert "model-00005-of-00012.safetensors: changed" in text
    assert "model-00006-of-00012.safetensors: missing" in text
    assert published(fleet) == []
    fleet.shell(FETCHER, f"rm -rf {PLACE}/disk")


def test_a_flipped_byte_is_found_by_a_full_pass_and_mended(fleet: Fleet) -> None:
    wipe(fleet)
    assert get_model(fleet).rc == 0
    (model,) = published(fleet)
    name = "model-00003-of-00004.safetensors"
    fleet.shell(
        FETCHER,
        f"ln -sfn {ARTIFACTS}/model/{model} {PLACE}/model; cd {PLACE}/model && "
        f"printf X | dd of={name} conv=notrunc bs=1 seek=70000 2>/dev/null",
    )
    health = ["playbooks/health.yml", *variables(health_fail_on="never")]
    assert name not in fleet.playbook(*health).output, "the size is right"
    run = fleet.playbook(*health, "-e", "health_deep=true")
    report = json.loads((ROOT / "reports/fleet.json").read_text())
    (node,) = [each for each in report["nodes"] if each["name"] == FETCHER]
    words = f"model {model} has other bytes: {name} changed"
    assert any(words in each for each in node["reasons"]), run.output[-3000:]
    hub = Hub()
    assert get_model(fleet).rc == 0
    assert hub.fetched() == {}, "the other nodes have what was lost here"
    assert published(fleet) == [model]
    shown = fleet.shell(FETCHER, f"sha256sum {PLACE}/model/{name}").output.split()[0]
    assert shown in fleet.shell(FETCHER, f"cat {PLACE}/model/manifest.json").output


def test_a_full_disk_is_said_before_and_while_fetching(fleet: Fleet) -> None:
    small = f"{PLACE}/small"
    fleet.shell(FETCHER, f"mkdir -p {small} && mount -t tmpfs -o size=320m tmpfs {small}")
    more = {
        "artifact_root": small,
        "model_repository": SHARDS_REPOSITORY,
        "model_revision": "main",
        "model_reserve_bytes": 1_000_000,
    }
    run = get_model(fleet, **{**more, "model_reserve_bytes": 100_000_000})
    assert run.rc != 0
    assert "The disk cannot take the model" in run.output
    lab("hub", json.dumps({"rate_bytes_per_second": 2_000_000}))
    when_fetching(
        fleet, small, f"fallocate -l $(df -B1 --output=avail {small} | tail -1) {small}/other"
    )
    run = get_model(fleet, **more)
    assert run.rc != 0
    assert "The disk is full" in " ".join(run.output.split()), run.output[-3000:]
    lab("hub", "{}")
    fleet.shell(FETCHER, f"rm {small}/other")
    hub = Hub()
    run = get_model(fleet, **more)
    assert run.rc == 0, run.output[-3000:]
    assert any(start > 0 for starts in hub.fetched().values() for start in starts)
    fleet.shell(FETCHER, f"umount {small}")


def test_the_token_is_nowhere_to_be_read(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    wipe(fleet)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    lab("hub", json.dumps({"gated": [TOKEN], "rate_bytes_per_second": 4_000_000}))
    process = fleet.start_playbook(
        "playbooks/model.yml",
        "-vvv",
        "--diff",
        *variables(model_repository=SHARDS_REPOSITORY, model_revision="main"),
    )
    # What any user of the host may see, and the environment, which only root sees.
    seen = ""
    look = "for i in $(seq 20); do cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ; sleep 0.1; done"
    said: list[str] = []
    assert process.stdout is not None
    # A pipe that nobody empties would stop the playbook.
    reader = threading.Thread(target=said.extend, args=(process.stdout,))
    reader.start()
    while process.poll() is None:
        seen += fleet.shell(FETCHER, f"{{ {look}; }} 2>/dev/null | tr '\\0' '\\n' | sort -u").output
        seen += subprocess.run(["ps", "axww", "-o", "args="], capture_output=True, text=True,
                               check=True).stdout  # fmt: skip
    reader.join()
    process.stdout.close()
    output = "".join(said)
    assert process.returncode == 0, output[-3000:]
    assert "AnsiballZ_hub_snapshot" in seen, "the samples were taken while it fetched"
    assert TOKEN not in seen
    assert TOKEN not in output
    places = f"/srv /etc /run /opt /var/log /var/lib /home /root {PLACE}"
    script = f"journalctl --no-pager | grep -c {TOKEN}; grep -rlI {TOKEN} {places} 2>/dev/null"
    assert fleet.shell(FETCHER, script).output.split() == ["0"]
    reports = [path for path in (ROOT / "reports").rglob("*") if path.is_file()]
    assert not [path for path in reports if TOKEN.encode() in path.read_bytes()]


def when_fetching(fleet: Fleet, root: str, action: str) -> None:
    """Let the fetcher do something as soon as it holds 30 MB of unfinished files."""
    there = f"du -sb {root}/.staging/model/*.parts 2>/dev/null | awk '$1 > 30000000' | grep -q ."
    script = f"until {there}; do sleep 0.1; done; {action}"
    fleet.shell(
        FETCHER,
        f"cat > /run/{WATCH}.sh <<'END'\n{script}\nEND\n"
        f"systemd-run --collect --unit={WATCH} bash /run/{WATCH}.sh",
    )


def wait_for(fleet: Fleet, script: str) -> None:
    wait_until(lambda: fleet.shell(FETCHER, script).rc == 0, f"in vain: {script}")
