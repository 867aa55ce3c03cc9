# SPDX-License-Identifier: Apache-2.0
"""Upgrades, failures in the middle of them, and the way back, while clients ask all the time."""

from __future__ import annotations

import csv
import json
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml

from .conftest import INVENTORY, Fleet, Run, assert_short, keep, lab, say, wait_until
from .load import Load, under_load

pytestmark = [pytest.mark.fleet, pytest.mark.long]

COLD_START_S = 60.0


def release(name: str) -> list[str]:
    """Return the arguments that name one of the lab's other releases."""
    variables = yaml.safe_load((INVENTORY / "hosts.yml").read_text())["all"]["vars"]
    return ["-e", json.dumps({"release_pull_requests": variables["lab_releases"][name]})]


def running(fleet: Fleet) -> dict[str, str]:
    """Return what each node runs, by the libraries that its engine has mapped."""
    script = (
        "pid=$(systemctl show -P MainPID glm-serving); "
        "grep -om1 'releases/[^/]*/lib' /proc/$pid/maps | cut -d/ -f2"
    )
    return {node: fleet.shell(node, script).output.strip() for node in fleet.nodes}


def statuses(fleet: Fleet) -> dict[str, str]:
    """Return what the gateway says of each node: UP, DOWN, DRAIN, MAINT or one of its phrases."""
    script = (
        "echo 'show stat' | socat stdio /run/haproxy/admin.sock 2>/dev/null"
        " || python3 -c 'import socket; s=socket.socket(socket.AF_UNIX);"
        's.connect("/run/haproxy/admin.sock"); s.sendall(b"show stat\\n");'
        'print(b"".join(iter(lambda: s.recv(65536), b"")).decode())\''
    )
    lines = fleet.shell(fleet.gateway, script).output.lstrip("# ").splitlines()
    return {
        row["svname"]: row["status"]
        for row in csv.DictReader(lines)
        if row["pxname"] == "glm_nodes" and row["svname"] != "BACKEND"
    }


def ready(fleet: Fleet) -> list[str]:
    """Name the nodes that the gateway sends requests to."""
    return sorted(node for node, status in statuses(fleet).items() if status == "UP")


def assert_no_request_was_lost(load: Load) -> None:
    assert load.requests, "the clients asked nothing"
    assert load.bad() == []


def row(run: Run, node: str, outcome: str) -> str:
    """Return the row of the end table that says so of a node."""
    heads = [found.end() for found in re.finditer(r"^node +outcome +release .*$", run.output, re.M)]
    assert heads, f"there is no end table:\n{run.output[-6000:]}"
    table = run.output[heads[-1] :].lstrip("\n").partition("\n\n")[0]
    found = [line for line in table.splitlines() if re.match(rf"{node} +{outcome}\b", line)]
    assert found, f"{node} {outcome} is not in the end table:\n{table}"
    return found[-1]


def own_time(fleet: Fleet, node: str, span: tuple[float, float]) -> tuple[float, float]:
    """Return the seconds of an absence that were ours, and those of stopping and starting vLLM."""
    begin, end = span
    script = f"journalctl -u glm-serving -o short-unix --no-pager --since @{int(begin) - 1}"
    times: dict[str, float] = {}
    for line in fleet.shell(node, script).output.splitlines():
        for name, words in (
            ("stopping", "systemd[1]: Stopping"),
            ("stopped", "systemd[1]: Stopped"),
            ("started", "systemd[1]: Started"),
            ("up", "startup complete"),
        ):
            if words in line:
                times.setdefault(name, float(line.split()[0]))
    vllm = times["stopped"] - times["stopping"] + times["up"] - times["started"]
    return end - begin - vllm, vllm


def test_an_upgrade_that_no_client_notices(fleet: Fleet) -> None:
    before = running(fleet)
    with under_load(fleet, "upgrade to another release") as load:
        run = fleet.playbook("playbooks/upgrade.yml", *release("second"), "-e", "serve_batch=1",
                             "-e", "serve_min_ready=2")  # fmt: skip
        assert run.rc == 0, run.output[-6000:]
        load.wait_ready(*fleet.nodes)
    assert_no_request_was_lost(load)
    assert load.fewest_ready() >= 2
    assert_short(run, 150)
    after = running(fleet)
    assert len(set(after.values())) == 1
    assert set(after.values()).isdisjoint(before.values())
    assert "release " in run.output and "canary" in run.output
    for node in fleet.nodes:
        row(run, node, "serves")
        spans = load.absence(node)
        assert len(spans) == 1, f"{node} was out {len(spans)} times: {spans}"
        (span,) = spans
        ours, vllm = own_time(fleet, node, span)
        say(
            f"{node}: out for {span[1] - span[0]:.1f} s: vLLM stopped and started in {vllm:.1f} s, "
            f"our part took {ours:.1f} s, {ours / vllm:.0%} of that"
        )
        # Loose, because two cores also carry the clients; the figure is what counts.
        assert ours < 0.3 * max(vllm, COLD_START_S)


FAILURES = {
    "graphs": (
        "an illegal instruction was encountered",
        "set serving_cuda_graphs to piecewise, then to eager",
        ["-e", "serving_cuda_graphs=piecewise", "-e", "serving_cuda_graphs_fallback=false"],
    ),
    "babble": ("greedy answer repeats", "greedy answer repeats", []),
    "hang": (
        "it makes no progress for 45 s",
        "journalctl -u glm-serving",
        ["-e", "serve_stall_timeout=45"],
    ),
}


@pytest.mark.parametrize("fault", FAILURES)
def test_a_bad_release_stops_at_the_canary(fleet: Fleet, fault: str) -> None:
    cause, remedy, arguments = FAILURES[fault]
    before = running(fleet)
    with under_load(fleet, f"upgrade to a release that fails: {fault}") as load:
        run = fleet.playbook("playbooks/upgrade.yml", *release(fault), *arguments)
    assert run.rc != 0
    assert_no_request_was_lost(load)
    assert running(fleet) == before
    assert ready(fleet) == fleet.nodes
    canary = fleet.nodes[0]
    row(run, canary, "rolled back")
    for node in fleet.nodes[1:]:
        row(run, node, "untouched")
        assert load.absence(node) == []
    assert cause in run.output
    assert remedy in run.output


def test_cuda_graphs_step_down_by_themselves(fleet: Fleet) -> None:
    """The release dies of every mode but eager, as full graphs did where they were measured."""
    canary = fleet.nodes[0]
    arguments = [*release("graphs"), "-e", "serving_cuda_graphs=piecewise",
                 "--limit", f"{canary},controller"]  # fmt: skip
    run = fleet.playbook("playbooks/upgrade.yml", *arguments, "-e", "health_fail_on=broken")
    assert run.rc == 0, run.output[-6000:]
    said = " ".join(run.output.split())
    assert "stepped down to eager" in said
    assert "an illegal instruction was encountered" in run.output
    # Never silent: the health check at the end of the run says what it costs.
    assert "CUDA graphs stepped down from piecewise to eager, about a fifth of the speed" in said
    assert ready(fleet) == fleet.nodes


def test_back_without_any_upstream_and_only_one_run_at_a_time(fleet: Fleet) -> None:
    before = running(fleet)
    lab("upstreams", "off")
    try:
        with under_load(fleet, "roll-back of all nodes") as load:
            process = fleet.start_playbook("playbooks/rollback.yml")
            assert process.stdout is not None
            output = ""
            second: Run | None = None
            for line in process.stdout:
                output += line
                if ": switches to deployment" in line and second is None:
                    second = fleet.playbook("playbooks/rollback.yml")
            process.wait()
            run = Run(process.returncode, output)
            load.wait_ready(*fleet.nodes)
    finally:
        lab("upstreams", "on")
    assert run.rc == 0, run.output[-6000:]
    assert second is not None
    assert second.rc != 0
    assert "Another run is changing this fleet" in second.output
    assert "rollback by" in second.output
    assert second.changed == {}
    assert_no_request_was_lost(load)
    after = running(fleet)
    assert all(after[node] != before[node] for node in fleet.nodes)
    assert ready(fleet) == fleet.nodes


FLAGS = ["-e", "serving_max_model_len=3072", "-e", "serve_batch=1"]


def run_and(
    fleet: Fleet, marker: str, act: Callable[[], object], flags: Sequence[str] = FLAGS
) -> Run:
    """Converge with other flags, and act once when the output has the marker."""
    process = fleet.start_playbook("site.yml", *flags)
    assert process.stdout is not None
    output, done = "", False
    for line in process.stdout:
        output += line
        if marker in line and not done:
            done = True
            act()
    process.wait()
    say(f"site.yml: rc {process.returncode}, acted: {done}")
    keep("site.yml, acted", output)
    return Run(process.returncode, output)


def test_whatever_breaks_in_the_middle_the_next_run_goes_on(fleet: Fleet) -> None:
    """The controller killed in a drain, a start and a rejoin, the gateway restarted, SSH cut,
    power cut: every run goes on where the one before was, and clients lose what was in flight
    in what was taken from under them."""
    first, second, third = fleet.nodes
    restarted: list[float] = []

    def restart_gateway() -> None:
        restarted.append(time.time())
        fleet.shell(fleet.gateway, "systemctl restart haproxy")

    with under_load(fleet, "everything breaks") as load:
        middles: dict[str, Callable[[], bool]] = {
            "drains": lambda: first not in ready(fleet),
            # The start goes on without a controller. The next one attests it.
            "is attested": lambda: True,
            "joins": lambda: statuses(fleet)[first] not in ("DRAIN", "MAINT"),
        }
        for step, until in middles.items():
            marker = f"  {first}: {step}"
            seen = fleet.kill_playbook_at(marker, "site.yml", *FLAGS, until=until)
            assert "PLAY RECAP" not in seen
            assert marker in seen
        assert "is taken over: its process is gone" in seen

        run = run_and(fleet, f"  {second}: is attested", lambda: lab("power", second, "no-ssh").rc)
        lab("power", second, "ssh")
        assert run.rc != 0
        row(run, second, "unreachable")
        row(run, third, "untouched")
        assert second not in ready(fleet)

        run = run_and(fleet, "Roll: ", restart_gateway)
        assert run.rc == 0, run.output[-6000:]
        assert ready(fleet) == fleet.nodes

        lab("power", third, "off")
        died = time.time()
        wait_until(lambda: ready(fleet) == [first, second], f"{third} is still asked", 20)
        lab("power", third, "on")
        wait_until(lambda: third in ready(fleet), f"{third} did not come back")
    moments = [*restarted, died]
    for each in load.bad():
        assert any(each.began <= moment + 5 and each.ended >= moment - 1 for moment in moments), (
            each
        )
    again = fleet.playbook("site.yml", *FLAGS)
    assert (again.rc, again.changed) == (0, {})


def test_a_node_that_loses_its_power_in_its_turn_stays_out(fleet: Fleet) -> None:
    flags = ["-e", "serving_max_model_len=2560", "-e", "serve_batch=1"]
    first, second, third = fleet.nodes
    with under_load(fleet, "a node loses its power in its turn") as load:
        run = run_and(
            fleet, f"  {first}: is attested", lambda: lab("power", first, "off").rc, flags
        )
        assert run.rc != 0
        row(run, first, "unreachable")
        row(run, second, "untouched")
        assert ready(fleet) == [second, third]
    # It was drained when it happened: nothing was in flight there.
    assert_no_request_was_lost(load)
    lab("power", first, "on")
    run = fleet.playbook("site.yml", *FLAGS)
    assert run.rc == 0, run.output[-6000:]
    assert ready(fleet) == fleet.nodes


def test_a_killed_server_comes_back_only_when_attested(fleet: Fleet) -> None:
    """kill -9 of the API server alone, as the kernel does when memory runs out."""
    victim = fleet.nodes[0]
    orphan = "exec -a VLLM::EngineCore sleep 600"
    fleet.shell(victim, f"systemd-run --unit=orphan --uid=glm bash -c '{orphan}'; "
                 "until pgrep -f '^VLLM::EngineCore 600'; do sleep 0.1; done")  # fmt: skip
    before = fleet.shell(victim, "systemctl show -P InvocationID glm-serving").output.strip()
    with under_load(fleet, "kill -9 of the API server") as load:
        wait_until(lambda: any(each.node == victim for each in load.requests), "nobody asked it")
        killed = time.time()
        fleet.shell(victim, "kill -9 $(systemctl show -P MainPID glm-serving)")
        # Without a request the gateway sees it at its next checks.
        wait_until(lambda: victim not in ready(fleet), f"{victim} is dead and takes requests", 20)
        load.wait_ready(victim)
    units = "-u glm-serving -u glm-sentry -u 'glm-prestart@*'"
    script = f"journalctl {units} -o cat --since -5min"
    journal = fleet.shell(victim, script).output
    assert "start gate: ended" in journal
    assert "VLLM::EngineCore" in journal
    assert "a start that nobody attended was attested" in journal
    after = fleet.shell(victim, "systemctl show -P InvocationID glm-serving").output.strip()
    assert after != before
    (span,) = [each for each in load.absence(victim) if each[1] > killed]
    say(f"{victim}: back after {span[1] - killed:.0f} s")
    for each in load.requests:
        if each.node == victim and each.outcome == "complete":
            assert each.ended <= killed + 1 or each.began >= span[1] - 2, each
    # What it was answering when it was killed is lost, and nothing else.
    assert all(each.began <= killed <= each.ended + 1 for each in load.bad()), load.bad()


def test_a_drained_node_stays_out_until_it_is_let_back(fleet: Fleet) -> None:
    node = fleet.nodes[1]
    # What other tests left for health to tell is told now.
    fleet.playbook("playbooks/health.yml", "-e", "health_fail_on=never")
    assert fleet.playbook("playbooks/drain.yml").rc != 0
    arguments = ["playbooks/drain.yml", "--limit", node, "-e", "drain_reason='new DIMM'"]
    drained = fleet.playbook(*arguments)
    assert drained.rc == 0, drained.output[-3000:]
    assert node not in ready(fleet)
    again = fleet.playbook(*arguments)
    assert (again.rc, again.changed) == (0, {})
    run = fleet.playbook("site.yml", *FLAGS)
    assert run.rc == 0, run.output[-3000:]
    assert "held: new DIMM" in run.output
    assert node not in ready(fleet)
    others = [each for each in fleet.nodes if each != node]
    refused = fleet.playbook("playbooks/drain.yml", "--limit", others[0], "-e", "serve_min_ready=2")
    assert refused.rc != 0
    assert "cannot be taken out of service" in refused.output
    assert ready(fleet) == others
    back = fleet.playbook("playbooks/undrain.yml", "--limit", node)
    assert back.rc == 0, back.output[-3000:]
    assert ready(fleet) == fleet.nodes


def test_maintenance_reboots_a_node_without_a_lost_request(fleet: Fleet, tmp_path: Path) -> None:
    node = fleet.nodes[2]
    tasks = tmp_path / "tasks.yml"
    tasks.write_text(
        "- name: Work on it\n  ansible.builtin.copy:\n    content: done\n    dest: /root/worked\n"
        "    mode: '0600'\n"
    )
    with under_load(fleet, "maintenance with a reboot") as load:
        run = fleet.playbook(
            "playbooks/maintenance.yml", "--limit", node,
            "-e", f"maintenance_tasks={tasks}", "-e", "maintenance_reboot=true",
        )  # fmt: skip
    assert run.rc == 0, run.output[-6000:]
    assert_no_request_was_lost(load)
    assert fleet.shell(node, "cat /root/worked").output == "done"
    assert ready(fleet) == fleet.nodes
