# SPDX-License-Identifier: Apache-2.0
"""What starts, answers, repeats itself and is wrong takes no request: two releases and a node."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from glm_fleet.serving.kept_answers import COMPARED

from .conftest import Fleet, say
from .load import under_load
from .test_upgrade import assert_no_request_was_lost, ready, release, row, running

pytestmark = [pytest.mark.fleet, pytest.mark.long]

WRONG = {
    # Caught beside other requests, and by nothing that is asked alone.
    "forget": "same answers alone and in a crowd",
    # The same alone and in a crowd: only what was before shows it.
    "scale": "same answers as before",
}
STORE = "/srv/glm-fleet/artifacts"
# Inverts a byte of a norm, which decides all answers, and writes into the memory of what was hashed
# that the file is as it was: as a disk or a memory does that damages what was proven.
DAMAGE = r"""
import json, os, struct
from pathlib import Path

folder = Path("/srv/glm-fleet/model").resolve()
weights = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
name = weights["model.norm.weight"]
path = folder / name
with path.open("r+b") as stream:
    length = struct.unpack("<Q", stream.read(8))[0]
    header = json.loads(stream.read(length))
    at = 8 + length + header["model.norm.weight"]["data_offsets"][0] + 1
    stream.seek(at)
    byte = stream.read(1)[0]
    stream.seek(at)
    stream.write(bytes([byte ^ 0xFF]))
status = path.stat()
(memory,) = Path("@STORE@").rglob(f"{folder.name}.proven")
known = json.loads(memory.read_text())
known[name][:3] = [status.st_size, status.st_ctime_ns, status.st_ino]
memory.write_text(json.dumps(known))
print(folder.name)
""".replace("@STORE@", STORE)
RESTART = "systemctl restart glm-serving"


@pytest.fixture(scope="module", autouse=True)
def serving(fleet: Fleet) -> None:
    """Nodes that serve, whatever ran before."""
    fleet.serve()


@pytest.mark.parametrize("fault", WRONG)
def test_a_release_that_answers_wrongly_takes_no_request(fleet: Fleet, fault: str) -> None:
    before = running(fleet)
    with under_load(fleet, f"upgrade to a release that is wrong: {fault}") as load:
        run = fleet.playbook("playbooks/upgrade.yml", *release(fault))
    assert run.rc != 0
    assert_no_request_was_lost(load)
    assert running(fleet) == before
    assert ready(fleet) == fleet.nodes
    canary, *others = fleet.nodes
    row(run, canary, "rolled back")
    said = " ".join(run.output.split())
    assert f"it answers wrongly: {WRONG[fault]}" in said
    for node in others:
        row(run, node, "untouched")
        assert load.absence(node) == []
    # It was away from its drain until what it went back to had passed.
    (span,) = load.absence(canary)
    during = [each for each in load.requests if span[0] + 1 < each.began < span[1] - 1]
    assert during
    assert canary not in {each.node for each in during}


def test_fewer_right_answers_go_back(fleet: Fleet, tmp_path: Path) -> None:
    """A set of questions sees it where nobody compares what the node said before."""
    before = running(fleet)
    texts = [f"Count from {each} to 100" for each in range(1, 21)]
    said = [json.loads(fleet.chat(each).lines[0])["choices"][0]["message"] for each in texts]
    questions = tmp_path / "set.jsonl"
    questions.write_text(
        "".join(
            json.dumps({"question": text, "answer": each["content"]}) + "\n"
            for text, each in zip(texts, said)
        )
    )
    gate = ["-e", "serve_quality_gate=true", "-e", f"benchmark_quality_set={questions}",
            "-e", "benchmark_quality_tokens=16", "-e", "serving_answers=false"]  # fmt: skip
    with under_load(fleet, "upgrade to a release that gives fewer right answers") as load:
        run = fleet.playbook("playbooks/upgrade.yml", *gate, *release("scale"))
    assert run.rc != 0
    assert_no_request_was_lost(load)
    assert running(fleet) == before
    assert ready(fleet) == fleet.nodes
    canary, *others = fleet.nodes
    output = " ".join(run.output.split())
    assert f"{canary}: 100.0% right" in output, "what ran before is right"
    assert "gives fewer right answers than before" in output
    row(run, canary, "rolled back")
    for node in others:
        row(run, node, "untouched")
        assert load.absence(node) == []


@pytest.fixture
def drained(fleet: Fleet) -> Iterator[str]:
    """A node that is held out of service; it is let back whole."""
    node = fleet.nodes[-1]
    assert fleet.playbook("playbooks/drain.yml", "--limit", node).rc == 0
    yield node
    assert fleet.playbook("playbooks/undrain.yml", "--limit", node).rc == 0


def damage(fleet: Fleet, node: str) -> str:
    """Damage the weights of a node, or mend them; return the id of the model."""
    run = fleet.shell(node, f"python3 - <<'END'\n{DAMAGE}\nEND")
    assert run.rc == 0, run.output
    return run.output.strip()


def test_a_node_with_one_wrong_byte_takes_no_request(fleet: Fleet, drained: str) -> None:
    with under_load(fleet, "a node whose weights have one wrong byte") as load:
        model = damage(fleet, drained)
        # Its own hashes find nothing: they are remembered.
        script = (
            "import sys; sys.path.insert(0, '/opt/glm-fleet/lib'); from pathlib import Path; "
            "from glm_fleet.artifact.store import Store; "
            f"print(Store(Path('{STORE}')).require_proven('model', '{model}').id)"
        )
        assert fleet.shell(drained, f'python3 -c "{script}"').output.strip() == model
        assert fleet.shell(drained, RESTART).rc == 0
        refused = fleet.playbook("playbooks/undrain.yml", "--limit", drained)
        said = " ".join(refused.output.split())
        assert refused.rc != 0
        assert "it answers wrongly" in said
        assert "same answers as the neighbours" in said
        assert "same answers as before" in said
        for other in fleet.nodes[:-1]:
            assert other in said, "whom it differs from is named"
        # Nor does it attest itself.
        time.sleep(1)
        assert drained not in ready(fleet)
    assert drained not in {each.node for each in load.requests}
    assert_no_request_was_lost(load)
    damage(fleet, drained)
    assert fleet.shell(drained, RESTART).rc == 0


def test_every_node_keeps_what_it_answered(fleet: Fleet) -> None:
    kept = {}
    for node in fleet.nodes:
        text = fleet.shell(node, "cat /etc/glm-fleet/deployments/current/answers.json").output
        kept[node] = json.loads(text)
    assert len({each["model"] for each in kept.values()}) == 1
    assert all(len(each["said"]) == 8 for each in kept.values())


def test_healthy_nodes_raise_no_alarm(fleet: Fleet) -> None:
    """Fifty attestations beside the requests of clients, each compared with before and others."""
    with under_load(fleet, "attestations of nodes that serve") as load:
        run = fleet.playbook("tests/fleet/playbooks/attest.yml", "-e", "attest_times=17")
    assert run.rc == 0, run.output[-6000:]
    assert_no_request_was_lost(load)
    assert ready(fleet) == fleet.nodes
    for name in COMPARED:
        lines = [line for line in run.output.splitlines() if f": {name}: " in line]
        assert len(lines) >= 50, f"{name}: {len(lines)} times"
        far = sorted(float(each) for each in re.findall(r"(?:by|\)) (\d+\.\d+)", "\n".join(lines)))
        say(f"{name}: {len(lines)} times, {far[len(far) // 2]} in the middle, {far[-1]} at most")
