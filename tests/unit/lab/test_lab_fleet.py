# SPDX-License-Identifier: Apache-2.0
"""Addresses, inventory, model and processes of the lab."""

from __future__ import annotations

import json
import os
import signal
import struct
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from lab import __main__ as command
from lab import inventory, model, network, rootfs, source, system
from lab.settings import NUMBER, LabError, fleet


def test_hosts_have_the_documented_addresses() -> None:
    hosts = fleet(64)
    assert len({host.address for host in hosts}) == 65
    lab = f"10.77.{NUMBER}"
    assert [hosts[0].address, hosts[63].address] == [f"{lab}.11", f"{lab}.74"]
    assert (hosts[-1].name, hosts[-1].address) == ("gw01", f"{lab}.101")
    assert all(len(host.veth) < 16 for host in hosts), "the kernel's limit"


def test_inventory_pins_host_keys_and_groups_hosts() -> None:
    data = inventory.build(fleet(2), {"model_endpoint": "http://hub"})["all"]
    assert list(data["children"]["gpu_nodes"]["hosts"]) == ["gpu01", "gpu02"]
    assert list(data["children"]["gateways"]["hosts"]) == ["gw01"]
    assert "StrictHostKeyChecking=yes" in data["vars"]["ansible_ssh_common_args"]
    assert data["vars"]["model_endpoint"] == "http://hub"


@pytest.mark.parametrize("nodes", [0, 65])
def test_node_count_out_of_range_is_refused(nodes: int) -> None:
    with pytest.raises(LabError, match="1 to 64") as caught:
        command.check_system(nodes)
    assert not caught.value.changed


def test_a_second_gateway_is_a_host_as_the_first() -> None:
    *_, first, second = fleet(1, 2)
    assert (first.name, second.name) == ("gw01", "gw02")
    assert second.address == f"10.77.{NUMBER}.102"
    group = inventory.build(fleet(1, 2), {})["all"]["children"]["gateways"]["hosts"]
    assert list(group) == ["gw01", "gw02"]
    with pytest.raises(LabError, match="GATEWAYS must be 1 to 2"):
        command.check_system(1, 3)


def test_a_lab_of_another_checkout_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, other = tmp_path / "checkout", tmp_path / "other"
    monkeypatch.setattr(command, "OWNER", owner)
    monkeypatch.setattr(command, "existing_hosts", lambda: fleet(1))
    # One that an earlier version brought up says nothing of its checkout.
    command.check_owner()
    owner.write_text(f"{command.REPOSITORY}\n")
    command.check_owner()
    # A checkout that is gone works with nothing.
    owner.write_text(f"{other}\n")
    command.check_owner()
    other.mkdir()
    with pytest.raises(LabError, match=f"by the checkout {other}; .*--anyway") as caught:
        command.check_owner()
    assert not caught.value.changed
    command.check_owner(anyway=True)
    monkeypatch.setattr(command, "existing_hosts", list)
    command.check_owner()


def test_other_user_of_the_network_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    address = {"family": "inet", "local": "10.77.0.9", "prefixlen": 16}
    monkeypatch.setattr(network, "links", lambda: {"eth7": {"addr_info": [address]}})
    with pytest.raises(LabError, match=r"eth7 has 10\.77\.0\.9/16"):
        network.check_addresses()


def test_model_is_the_same_every_time_and_differs_by_seed(tmp_path: Path) -> None:
    first, second = (model.weight_files(seed) for seed in model.SEEDS)
    assert first == model.weight_files(model.SEEDS[0])
    assert model.commit_id(first) != model.commit_id(second)
    revisions = model.write_repository(tmp_path / "repository")
    assert json.loads((tmp_path / "repository/refs.json").read_text())["main"] == revisions[-1]


def test_shards_hold_every_tensor_once() -> None:
    files = model.weight_files("seed")
    index = json.loads(files["model.safetensors.index.json"])
    seen = {}
    for name in sorted(set(index["weight_map"].values())):
        (length,) = struct.unpack("<Q", files[name][:8])
        header = json.loads(files[name][8 : 8 + length])
        del header["__metadata__"]
        ends = [entry["data_offsets"][1] for entry in header.values()]
        assert max(ends) == len(files[name]) - 8 - length
        for tensor, entry in header.items():
            assert index["weight_map"][tensor] == name
            seen[tensor] = tuple(entry["shape"])
    assert seen == model.shapes()
    assert len(set(index["weight_map"].values())) == model.SHARDS


def test_model_says_words_and_never_the_end_token() -> None:
    ids = model.vocabulary()
    assert len(ids) == model.VOCABULARY and sorted(ids.values()) == list(range(1024))
    assert not set(model.spoken_ids()) & {ids[token] for token in model.SPECIAL}
    rows = model.tensor("seed", "lm_head.weight", (model.VOCABULARY, model.HIDDEN))
    end = ids["<|im_end|>"] * model.HIDDEN * 2
    assert not any(rows[end : end + model.HIDDEN * 2])


def test_flat_repository_lists_sizes_and_hashes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a_1%3a2_all.deb").write_bytes(b"package")
    monkeypatch.setattr(rootfs, "run", lambda *_: SimpleNamespace(stdout="Package: a\n"))
    rootfs.write_index(tmp_path)
    text = (tmp_path / "Packages").read_text()
    assert "Filename: ./a_1-2_all.deb\nSize: 7\nSHA256: " in text
    assert " Packages.gz\n" in (tmp_path / "Release").read_text()


def test_package_index_is_the_configured_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://pip.example/simple/")
    monkeypatch.delenv("UV_DEFAULT_INDEX", raising=False)
    assert source.index_url() == "http://pip.example/simple"
    monkeypatch.setenv("UV_DEFAULT_INDEX", "http://uv.example/simple")
    assert source.index_url() == "http://uv.example/simple"


def test_marked_process_is_found_and_stopped(tmp_path: Path) -> None:
    name = f"test:{os.getpid()}:"
    pid = system.start(name, ["sleep", "60"], log=tmp_path / "log")
    try:
        deadline = time.monotonic() + 5
        while not system.processes(name) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert [process.pid for process in system.processes(name)] == [pid]
        assert not system.Process(pid, "another name").signal(signal.SIGKILL)
    finally:
        assert system.stop(name, grace_seconds=2) == [name]
    assert system.processes(name) == []


def test_atomic_write_leaves_one_file(tmp_path: Path) -> None:
    system.write_atomic(tmp_path / "file", "content", mode=0o600)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o600
