# SPDX-License-Identifier: Apache-2.0
"""tune.yml as Ansible runs it, on a node whose engine is simulated, from drain to return."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
Values = dict[str, Any]
# Stands for the modules of a node and its gateway. Speed follows from the unit and environment that
# were rendered; what was switched to last is what answers.
MODULE = """#!/usr/bin/python
# WANT_JSON
import hashlib, json, os, re, sys
given = json.load(open(sys.argv[1]))
folder = os.environ["GLM_TEST"]
name = os.path.basename(folder) and given["_ansible_module_name"].rpartition(".")[2]
asked = given.get("state") or given.get("mode") or "measure"
told = {key: each for key, each in given.items() if not key.startswith("_ansible")}
with open(f"{folder}/calls", "a") as calls:
    calls.write(json.dumps([name, asked, told]) + "\\n")

def load(path, otherwise):
    return json.load(open(f"{folder}/{path}")) if os.path.exists(f"{folder}/{path}") else otherwise

def save(path, value):
    json.dump(value, open(f"{folder}/{path}", "w"))

def runs():
    return load("staged", {})[load("current", "")]

def speed(found):
    text = found["unit"] + found["environment"]
    rate = 100.0
    rate *= 1.5 if re.search(r"--max-num-seqs 64", text) else 1.0
    rate *= {"4096": 1.2, "8192": 1.1}.get("".join(re.findall(r"batched-tokens (\\d+)", text)), 1.0)
    rate *= 0.6 if "NCCL_PROTO=Simple" in text else 1.0
    return rate

result = {"changed": False}
if name == "deployment":
    staged = load("staged", {})
    if asked == "staged":
        text = given["unit"] + given["environment"]
        known = hashlib.sha256(text.encode()).hexdigest()[:12]
        staged[known] = {key: given[key] for key in ("unit", "environment", "release", "model")}
        save("staged", staged)
        result = {"changed": True, "id": known}
    elif asked == "info":
        current = load("current", "")
        result.update(
            running={"active": True}, differences=[], ladder=[], back="", starts=[100.0],
            current={"id": current, **{key: staged[current][key] for key in ("release", "model")}},
        )
    elif asked == "options":
        result["options"] = ["--async-scheduling", "--max-num-batched-tokens"]
    elif asked == "active":
        result["changed"] = load("current", "") != given["id"]
        save("current", given["id"])
        found = staged[given["id"]]
        result["deployment"] = {"id": given["id"], "port": 8000, "cuda_graphs": "eager",
                                "release": found["release"], "model": found["model"]}
elif name == "vllm_probe" and asked == "watch":
    result["watched"] = {"ready": True, "phase": "ready", "progress": ""}
elif name == "vllm_probe":
    if "enforce-eager" in runs()["unit"]:
        result = {"failed": True, "msg": "not passed", "diagnosis": "CUDA out of memory"}
    result["attestation"] = {"passed": not result.get("failed")}
elif name == "vllm_bench":
    if os.path.exists(f"{folder}/kill-after") and len(load("staged", {})) > 2:
        os.remove(f"{folder}/kill-after")
        os.kill(int(open(f"{folder}/controller").read()), 9)
        sys.exit(1)
    at = len(open(f"{folder}/calls").readlines())
    rate = speed(runs()) * (1.003 if at % 2 else 0.997)
    level = {"streams": 1, "output_rate": rate, "decode_per_stream": rate, "decode_together": rate}
    result.update(levels=[level], clients={})
elif name == "fleet_lock":
    held = load("held", {})
    if asked == "held":
        held[given["node"]] = {"reason": given["reason"]}
    elif asked == "unheld":
        held.pop(given["node"], None)
    save("held", held)
    result.update(roll={}, held=held)
elif name == "haproxy_server":
    result.update(before="ready", sessions=0)
print(json.dumps(result))
"""
STUBS = ("deployment", "vllm_probe", "vllm_bench", "fleet_lock", "haproxy_server")
SETTINGS: Values = {
    "serving_cuda_graphs": ["piecewise", "eager"],
    "serving_max_num_seqs": [32, 64],
    "--max-num-batched-tokens": [4096],
    "--not-of-this-release": [1, 2],
}


class Lab:
    """A node and a gateway that are this machine, and what was asked of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.record = folder / "reports/tune-gpu01.json"
        (folder / "library").mkdir()
        for name in STUBS:
            (folder / "library" / f"{name}.py").write_text(MODULE)
        python = folder / "python"
        python.write_text(f'#!/bin/sh\nGLM_TEST={folder} exec {sys.executable} "$@"\n')
        python.chmod(0o755)
        place = {"ansible_connection": "local", "ansible_python_interpreter": str(python)}
        variables: Values = {
            "ansible_become": False,
            "artifact_root": str(folder / "artifacts"),
            "benchmark_report_dir": str(folder / "reports"),
            "gateway_authentication": "none",
            "serving_cuda_graphs": "piecewise",
            "serving_environment": {"NCCL_DEBUG": "WARN"},
            "serving_extra_arguments": ["--seed", "1"],
            "tune_settings": SETTINGS,
            "tune_streams": [1],
            "tune_repeats": [2, 2],
            "tune_starts": 5,
            "benchmark_clients": 0,
        }
        hosts = {
            "gpu_nodes": {"hosts": {"gpu01": place}},
            "gateways": {"hosts": {"gw01": place}},
        }
        inventory = {"all": {"children": hosts, "vars": variables}}
        (folder / "hosts.yml").write_text(yaml.safe_dump(inventory, sort_keys=False))
        # What the node runs before: nothing that the inventory would give.
        before = {"unit": "", "environment": "", "release": "vllm-0", "model": "glm-0"}
        (folder / "staged").write_text(json.dumps({"before": before}))
        (folder / "current").write_text('"before"')

    def tune(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run tune.yml to its end, or until it is killed."""
        command = [
            str(Path(sys.executable).with_name("ansible-playbook")),
            *("-i", str(self.folder / "hosts.yml"), str(ROOT / "playbooks/tune.yml")),
            *("--limit", "gpu01", *arguments),
        ]
        environment = {
            **os.environ,
            "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
            "ANSIBLE_LIBRARY": f"{self.folder}/library:{ROOT}/library",
            "ANSIBLE_NOCOLOR": "1",
            "ANSIBLE_ASYNC_DIR": str(self.folder / "jobs"),
        }
        with subprocess.Popen(
            command,
            env=environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            (self.folder / "controller").write_text(str(process.pid))
            output = process.communicate(timeout=600)[0]
        return subprocess.CompletedProcess(command, process.returncode, output, "")

    def calls(self, name: str, asked: str) -> list[Values]:
        """Return what a module was given, each time that it was asked."""
        lines = map(json.loads, (self.folder / "calls").read_text().splitlines())
        return [options for module, what, options in lines if (module, what) == (name, asked)]

    def read(self) -> Values:
        """Return the record of the tune."""
        found: Values = json.loads(self.record.read_text())
        return found

    def held(self) -> Values:
        """Return the nodes that are held out of service."""
        found: Values = json.loads((self.folder / "held").read_text())
        return found


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


def test_the_best_settings_are_found_and_the_node_is_back(lab: Lab) -> None:
    done = lab.tune()
    assert done.returncode == 0, done.stdout
    record = lab.read()
    assert record["state"] == "done"
    assert record["left_out"] == {"--not-of-this-release": "this release does not have it"}
    best = record["best"]
    assert best["better"], done.stdout
    assert best["settings"] == {"serving_max_num_seqs": 64, "--max-num-batched-tokens": 4096}
    assert best["gain"] == pytest.approx(1.8, rel=0.02)
    lost = [each for each in record["tries"] if each["problem"]]
    assert [each["settings"] for each in lost] == [{"serving_cuda_graphs": "eager"}]
    assert lost[0]["problem"] == "CUDA out of memory"
    assert record["tries"][-1]["confirms"]
    inventory = yaml.safe_load(lab.record.with_suffix(".yml").read_text())
    assert inventory == {
        "serving_max_num_seqs": 64,
        "serving_extra_arguments": ["--seed", "1", "--max-num-batched-tokens", "4096"],
    }
    assert json.loads((lab.folder / "current").read_text()) == "before"
    assert lab.held() == {}
    assert [each["reason"] for each in lab.calls("fleet_lock", "held")] == ["tuning"]
    assert lab.calls("fleet_lock", "taken")[-1]["backs"] == {"gpu01": "before"}
    assert [each["state"] for each in lab.calls("haproxy_server", "ready")] == ["ready"]
    # Nothing that was tried is what a failure would go back to.
    switched = lab.calls("deployment", "active")
    last = ""
    for each in switched:
        assert each.get("disproved", "") == (last if last not in ("", each["id"]) else "")
        last = each["id"]
    assert all(each["rungs"] == ["before"] for each in switched)
    assert "1.8" in done.stdout


def test_a_tune_that_was_killed_goes_on(lab: Lab) -> None:
    (lab.folder / "kill-after").touch()
    killed = lab.tune()
    assert killed.returncode == -9
    halfway = lab.read()
    assert halfway["state"] == "running"
    assert halfway["tries"], killed.stdout
    assert halfway["before"] == "before"
    assert lab.held()["gpu01"]["reason"] == "tuning"
    done = lab.tune()
    assert done.returncode == 0, done.stdout
    record = lab.read()
    assert record["tries"][: len(halfway["tries"])] == halfway["tries"]
    assert record["began"] == halfway["began"]
    assert record["best"]["better"]
    assert json.loads((lab.folder / "current").read_text()) == "before"
    assert lab.held() == {}
    settings = [json.dumps(each["settings"]) for each in record["tries"] if not each["confirms"]]
    assert len(settings) == len(set(settings)), "what was measured is not measured again"


def test_no_time_is_no_start_and_a_node_that_is_back(lab: Lab) -> None:
    done = lab.tune("-e", "tune_limit=1")
    assert done.returncode == 0, done.stdout
    record = lab.read()
    assert [each["settings"] for each in record["tries"]] == [{}]
    assert record["ended"] == "no time is left"
    assert not record["best"]["better"]
    assert yaml.safe_load(lab.record.with_suffix(".yml").read_text()) == {}
    assert json.loads((lab.folder / "current").read_text()) == "before"
    assert lab.held() == {}


def test_check_mode_says_what_would_be_tried(lab: Lab) -> None:
    done = lab.tune("--check")
    assert done.returncode == 0, done.stdout
    assert "serving_max_num_seqs: 32, 64 (now 32)" in done.stdout
    assert not lab.record.exists()
    assert lab.calls("deployment", "active") == []
