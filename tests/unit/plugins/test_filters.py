# SPDX-License-Identifier: Apache-2.0
"""The filters of the playbooks."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ansible.errors import AnsibleFilterError
from glm_fleet.artifact.manifest import FileEntry, Manifest, artifact_id

PLUGINS = Path(__file__).resolve().parents[3] / "plugins"


class Filters:
    """The filters as Ansible finds them: by name, loaded when one is used."""

    def __init__(self) -> None:
        spec = importlib.util.spec_from_file_location("fleet", PLUGINS / "filter/fleet.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self.registered = module.FilterModule().filters()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        found: Callable[..., Any] = self.registered[name]
        return found


filters = Filters()

HOSTVARS = {
    "gpu01": {"artifact_plan": {"published": []}, "ansible_host": "192.0.2.11"},
    "gpu02": {"artifact_plan": {"published": ["m-1"]}, "artifact_address": "198.51.100.2"},
    "gpu03": {"artifact_plan": {"published": ["m-1", "r-1"]}},
    "controller": {
        "release_artifact": {"id": "r-1", "manifest": {"kind": "release"}},
        "ansible_connection": "local",
    },
    "empty": {"release_artifact": {"id": "", "manifest": {}}},
}


def test_a_host_lacks_what_it_has_not_published() -> None:
    hosts = ["gpu01", "gpu02", "gpu03"]
    assert filters.lacking(HOSTVARS, hosts, [{"id": "m-1"}]) == ["gpu01"]
    assert filters.lacking(HOSTVARS, hosts, [{"id": "m-1"}, {"id": "r-1"}]) == ["gpu01", "gpu02"]


def test_fetchers_fetch_a_share_each_of_what_no_host_has() -> None:
    files = tuple(FileEntry(name, 70_000_000, "0" * 64) for name in "abcd")
    made = Manifest("model", artifact_id("m", files), files, {})
    options = {"repository": "lab/model"}
    offer = {
        "id": made.id, "manifest": made.as_dict(), "missing": ["a", "b", "d"],
        "fetchers": ["gpu01", "gpu02"],
    }  # fmt: skip
    hosts = ["gpu01", "gpu02", "gpu03"]
    first = filters.hub_share(HOSTVARS, "gpu01", hosts, offer, options)
    second = filters.hub_share(HOSTVARS, "gpu02", hosts, offer, options)
    assert sorted([*first["files"], *second["files"]]) == ["a", "b", "d"]
    assert first["repository"] == "lab/model"
    assert first["manifest"]["id"] == made.id
    assert filters.hub_share(HOSTVARS, "gpu03", hosts, offer, options) == {}
    # Who has nothing to fetch takes part, but needs no hub.
    less = {**offer, "missing": first["files"]}
    assert filters.hub_share(HOSTVARS, "gpu02", hosts, less, options) == {}
    # gpu02 and gpu03 have it all: nobody asks the hub.
    assert filters.hub_share(HOSTVARS, "gpu01", hosts, {**offer, "id": "m-1"}, options) == {}
    assert filters.hub_share(HOSTVARS, "gpu01", hosts, {"id": "m-2"}, options) == {}


def test_the_controller_pushes_only_what_no_host_has() -> None:
    hosts = ["gpu01", "gpu02"]
    (offer,) = filters.offers(HOSTVARS, {"release": "controller", "model": "empty"})
    assert (offer["kind"], offer["push"]) == ("release", True)
    assert filters.pushed_to(HOSTVARS, hosts, offer) == "gpu01"
    assert filters.pushed_to(HOSTVARS, [*hosts, "gpu03"], offer) == ""
    assert filters.pushed_to(HOSTVARS, hosts, {**offer, "push": False}) == ""


def test_a_fetcher_beside_the_nodes_gives_and_does_not_take() -> None:
    hosts = ["gpu01", "gpu02", "gpu03"]
    nodes = ["gpu01"]
    assert filters.taking_part(HOSTVARS, hosts, nodes, {"id": "m-1"}) == hosts
    assert filters.taking_part(HOSTVARS, hosts, nodes, {"id": "r-1"}) == ["gpu01", "gpu03"]


def test_a_host_is_reached_under_its_own_address_first() -> None:
    hosts = ["gpu01", "gpu02", "gpu03"]
    assert filters.addresses(HOSTVARS, hosts) == ["192.0.2.11", "198.51.100.2", "gpu03"]


def test_an_artifact_that_was_not_made_is_empty() -> None:
    assert filters.artifact_of(HOSTVARS, "release", "controller")["id"] == "r-1"
    assert filters.artifact_of(HOSTVARS, "release", "empty") == {}
    assert filters.artifact_of(HOSTVARS, "model", "gpu01") == {}


def test_the_artifacts_of_a_run_are_those_of_the_first_maker() -> None:
    groups = {"builders": ["controller"], "fetchers": ["gpu01"]}
    assert filters.artifacts_of_run(HOSTVARS, groups) == ["r-1"]
    assert filters.artifacts_of_run(HOSTVARS, {"builders": ["empty"]}) == []


def test_every_filter_that_is_registered_is_there() -> None:
    filters.artifact_of(HOSTVARS, "release", "controller")
    home = sys.modules["glm_filters"]
    assert [name for name in filters.registered if not callable(getattr(home, name, None))] == []


def test_what_one_node_protects_stays_for_all() -> None:
    hostvars = {
        "gpu01": {"artifact_retired": {"protected": ["b", "a"]}},
        "gpu02": {"artifact_retired": {"protected": ["a"]}},
        "gpu03": {},
    }
    assert filters.protected_on(hostvars, ["gpu01", "gpu02", "gpu03"]) == ["a", "b"]


def test_the_node_that_rehearses_before_weights_are_fetched() -> None:
    nodes = ["gpu01", "gpu02"]
    groups = {"builders": ["controller"], "fetchers": ["gpu01"]}
    lacks = {**HOSTVARS, "gpu01": {"model_missing": [{"path": "a.safetensors"}]}}

    def chosen(variables: Any = lacks, mode: str = "auto", canary: str = "", **more: Any) -> Any:
        return filters.rehearsing(
            variables, nodes, {**groups, **more}, canary, mode, more.get("check", False)
        )

    assert chosen() == ["gpu01"]
    assert chosen(canary="gpu02") == ["gpu02"]
    assert chosen(canary="gpu09") == ["gpu01"]
    assert chosen(mode="never") == []
    # The weights are here, so the canary rehearses in its turn; as in a fleet that served before.
    assert chosen(HOSTVARS) == []
    served = {"gpu02": {"__serving_served": {"stat": {"exists": True}}}}
    assert chosen({**lacks, **served}) == []
    assert chosen({**lacks, **served}, mode="asked") == ["gpu01"]
    # Without a release there is nothing to rehearse; a check of a bare fleet tells of it.
    unmade = {**lacks, "controller": {}}
    assert chosen(unmade, mode="asked") == []
    assert chosen({**unmade, "gpu01": {}}, check=True) == []
    local = {"controller": {"ansible_connection": "local"}}
    assert chosen({**unmade, **local, "gpu01": {}}, check=True) == ["gpu01"]
    # A release that was built on a node goes to no other one here.
    built = {"gpu02": {"release_artifact": {"id": "r", "manifest": {"kind": "release"}}}}
    assert chosen({**lacks, **built}, builders=["gpu02"]) == ["gpu02"]


def test_what_is_read_beside_the_weights() -> None:
    sizes = {"config.json": 9, "tokenizer.json": 20_000_000, "model-1.safetensors": 5,
             "model.safetensors.index.json": 5, "README.md": 1}  # fmt: skip
    entries = tuple(FileEntry(name, size, "0" * 64) for name, size in sizes.items())
    manifest = Manifest("model", artifact_id("m", entries), entries, {})
    assert filters.small_files(manifest.as_dict()) == ["config.json", "tokenizer.json"]


LOCKED = "a==1 \\\n    --hash=sha256:11\n"


def test_a_lock_is_pinned_for_its_own_inputs_alone(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(LOCKED)
    inputs = {"base_wheel": "vllm==1", "constraints": ["b>=2"], "python_version": "3.12"}
    entry = {"file": "a.txt", "sha256": hashlib.sha256(LOCKED.encode()).hexdigest(), **inputs}
    assert filters.pinned_lock([entry], str(tmp_path), inputs) == LOCKED
    assert filters.pinned_lock([], str(tmp_path), inputs) == ""
    for name in inputs:
        other = {**inputs, name: "other"}
        assert filters.pinned_lock([entry], str(tmp_path), other) == ""
    with pytest.raises(AnsibleFilterError, match="another text than the one that was pinned"):
        filters.pinned_lock([{**entry, "sha256": "0" * 64}], str(tmp_path), inputs)
    with pytest.raises(AnsibleFilterError, match="cannot be read"):
        filters.pinned_lock([{**entry, "file": "none.txt"}], str(tmp_path), inputs)


def test_speculation_with_a_release_that_is_wrong_then_is_refused() -> None:
    head = "3740c02bb1223d37823593664ae3eafa397b9937"
    source = {"pull_requests": [{"number": 38476, "head": head}]}
    release = {"manifest": {"provenance": {"inputs": {"source": source}}}}
    assert filters.speculative_config({}, release) == ""
    with pytest.raises(AnsibleFilterError, match="Speculation is wrong with this release"):
        filters.speculative_config({"method": "mtp", "num_speculative_tokens": 1}, release)
