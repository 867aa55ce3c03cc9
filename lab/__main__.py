# SPDX-License-Identifier: Apache-2.0
"""Hosts with simulated GPUs, and the upstreams they talk to, on this machine."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from . import gpu, hosts, hub, inventory, model, network, rootfs, source, upstreams
from .settings import (
    ALL_HOSTS,
    CACHE,
    INVENTORY,
    MAX_GATEWAYS,
    MAX_NODES,
    OWNER,
    REPOSITORY,
    SSH,
    STATE,
    Host,
    LabError,
    existing_hosts,
    fleet,
)
from .system import (
    building,
    exclusive,
    mounts_below,
    processes,
    run,
    say,
    seconds_since_start,
    stop,
    warn,
    write_atomic,
)

# Bytes. Measured: root file system and its packages, wheels, git repository and model; and what
# a node holds once two releases and models have been installed on it.
CACHE_BYTES = 3 * 10**9
NODE_BYTES = 4 * 10**9


def check_owner(anyway: bool = False) -> None:
    """Raise LabError, with nothing changed, when another checkout brought the lab up.

    That one has the inventory, and may be at work on the hosts.
    """
    owner = OWNER.read_text(encoding="utf-8").strip() if OWNER.is_file() else ""
    foreign = owner and owner != str(REPOSITORY) and Path(owner).is_dir()
    if foreign and existing_hosts() and not anyway:
        raise LabError(
            f"the lab was brought up by the checkout {owner}; run this there, or add --anyway "
            "when you know that nobody works with it",
            changed=False,
        )


def check_system(nodes: int, gateways: int = 1) -> None:
    """Raise LabError, with nothing changed, unless these hosts can run here."""
    if not 1 <= gateways <= MAX_GATEWAYS:
        raise LabError(f"GATEWAYS must be 1 to {MAX_GATEWAYS}, not {gateways}", changed=False)
    if not 1 <= nodes <= MAX_NODES:
        raise LabError(f"NODES must be 1 to {MAX_NODES}, not {nodes}", changed=False)
    check_root()
    release = Path("/etc/os-release")
    known = release.read_text(encoding="utf-8") if release.exists() else ""
    identifiers = [line for line in known.splitlines() if line.startswith(("ID=", "ID_LIKE="))]
    if not any("debian" in line or "ubuntu" in line for line in identifiers):
        raise LabError("the lab runs on Debian 12 or Ubuntu; this system is neither", changed=False)
    tools = ("systemd-nspawn", "mmdebstrap", "ip", "git", "ssh", "ssh-keygen", "mount")
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing:
        packages = Path(__file__).with_name("packages.txt").read_text().split()
        raise LabError(
            f"{', '.join(missing)} not found; run: apt-get install {' '.join(packages)}",
            changed=False,
        )
    running = [host for host in existing_hosts() if host.role == "gpu"]
    front = [host for host in existing_hosts() if host.role == "gateway"]
    if len(front) > gateways:
        raise LabError(
            f"the lab has {len(front)} gateways and {gateways} were asked for; "
            "take it down first (make lab-down)",
            changed=False,
        )
    if len(running) > nodes:
        raise LabError(
            f"the lab has {len(running)} GPU nodes and {nodes} were asked for; "
            "take it down first (make lab-down)",
            changed=False,
        )
    network.check_addresses()
    existing = CACHE
    while not existing.exists():
        existing = existing.parent
    cache = 0 if rootfs.rootfs_folder().is_dir() and source.WHEELS.is_dir() else CACHE_BYTES
    needed = cache + NODE_BYTES * (nodes - len(running))
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise LabError(
            f"{needed / 1e9:.0f} GB of free disk are needed in {existing} "
            f"({cache / 1e9:.0f} for the cache, {NODE_BYTES / 1e9:.0f} per GPU node), "
            f"{free / 1e9:.1f} are free",
            changed=False,
        )


def check_root() -> None:
    if os.geteuid() != 0:
        raise LabError("the lab makes namespaces and mounts: run it as root", changed=False)


def up(arguments: argparse.Namespace) -> None:
    """Bring the fleet up, or complete it."""
    check_owner(arguments.anyway)
    check_system(arguments.nodes, arguments.gateways)
    with exclusive():
        check_owner(arguments.anyway)
        check_system(arguments.nodes, arguments.gateways)
        write_atomic(OWNER, f"{REPOSITORY}\n")
        wanted = fleet(arguments.nodes, arguments.gateways)
        with building(), ThreadPoolExecutor(max_workers=2) as pool:
            # Downloads and the root file system wait on different things.
            sources = pool.submit(source.build)
            root, debs = rootfs.build()
            model.build()
            git = sources.result()
        network.ensure_bridge()
        hosts.ensure(wanted, root)
        upstreams.ensure(debs, git)
        say("upstreams answer: " + ", ".join(server.url for server in upstreams.servers()))
        inventory.write(wanted, upstreams.inventory_vars(git))
        say(f"inventory written: {INVENTORY}")
    print_status()


def down(arguments: argparse.Namespace) -> None:
    """Take everything down and prove that nothing is left."""
    check_root()
    check_owner(arguments.anyway)
    with exclusive():
        check_owner(arguments.anyway)
        removed = [f"process {name}" for name in stop("host:", grace_seconds=4)]
        hosts.kill_containers()
        removed += [f"process {name}" for name in stop("", grace_seconds=2)]
        for control in SSH.glob("cp-*"):
            run(["ssh", "-O", "exit", "-S", control, "lab"], check=False)
        removed += hosts.remove_all()
        removed += network.remove_all()
        with building():
            rootfs.remove_leftovers()
            source.remove_leftovers()
        for folder in (STATE, *([CACHE] if arguments.purge else [])):
            if folder.is_dir():
                shutil.rmtree(folder)
                removed.append(f"folder {folder}")
        if INVENTORY.exists():
            INVENTORY.unlink()
            removed.append(f"file {INVENTORY}")
        for item in removed:
            say(f"removed {item}")
        left = [f"process {process.name} {process.pid}" for process in processes()]
        left += [f"process {pid}" for pid in hosts.container_pids()]
        left += [f"mount {point}" for point in mounts_below(STATE) + mounts_below(CACHE)]
        left += network.leftovers()
        if left:
            raise LabError("still there: " + ", ".join(left))
    say("the lab is down: no process, mount, namespace or link of it is left")


def host_row(host: Host) -> list[str]:
    """name, role, address, state, ssh, uptime, GPUs."""
    container = hosts.container_pids(host.name)
    init = next(filter(hosts.is_init, container), None)
    age = seconds_since_start(init) if init else None
    ssh = "yes" if container and hosts.answers_ssh(host) else "no"
    if not container:
        state = "stopped"
    elif ssh == "yes":
        state = "running"
    else:
        state = "booting" if (age or 0) < 30 else "silent"
    uptime = f"{age:.0f} s" if age is not None else "-"
    gpus = "-"
    if host.role == "gpu":
        try:
            gpus = gpu.summary(gpu.read_state(host))
        except LabError:
            gpus = "not mounted"
    return [host.name, host.role, host.address, state, ssh, uptime, gpus]


def print_table(rows: list[list[str]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def print_status() -> None:
    known = existing_hosts()
    if not known:
        print("The lab is down (make lab-up brings it up).")
        return
    with ThreadPoolExecutor(max_workers=16) as pool:
        rows = list(pool.map(host_row, known))
    print_table([["HOST", "ROLE", "ADDRESS", "STATE", "SSH", "UPTIME", "GPUS"], *rows])
    print()
    listed = [
        [server.name, server.url, "answers" if server.answers() else "silent"]
        for server in upstreams.servers()
    ]
    print_table([["UPSTREAM", "URL", "STATE"], *listed])


def status(_: argparse.Namespace) -> None:
    """Show hosts and upstreams."""
    check_root()
    print_status()


def known_host(name: str) -> Host:
    host = ALL_HOSTS.get(name)
    if host is None or not host.folder.is_dir():
        names = ", ".join(host.name for host in existing_hosts()) or "none: the lab is down"
        raise LabError(f"there is no host {name}; the lab has: {names}", changed=False)
    return host


def shell(arguments: argparse.Namespace) -> int:
    """Log in to a host over SSH, or run a command there."""
    host = known_host(arguments.host)
    command = hosts.ssh_command(host)
    if not arguments.command and sys.stdin.isatty():
        command.insert(1, "-t")
    return subprocess.run([*command, *arguments.command], check=False).returncode


def power(arguments: argparse.Namespace) -> None:
    """Pull a host's power or cable, or stop its sshd, or put them back."""
    check_root()
    host = known_host(arguments.host)
    with exclusive():
        if arguments.action == "off":
            hosts.power_off(host)
        elif arguments.action in ("no-ssh", "ssh"):
            hosts.set_ssh(host, on=arguments.action == "ssh")
        elif arguments.action == "on":
            (host.folder / hosts.POWERED_OFF).unlink(missing_ok=True)
            hosts.mount(host, rootfs.rootfs_folder())
            network.ensure_host(host)
            hosts.boot(host)
            hosts.wait_for_ssh([host])
        else:
            network.set_link(host, up=arguments.action == "join")
    say(f"{host.name}: power {arguments.action} done")


def switch_upstreams(arguments: argparse.Namespace) -> None:
    """Stop git, hub and package repository, or start them again."""
    check_root()
    with exclusive():
        stop("upstream:", grace_seconds=2)
        if arguments.action == "on":
            _, debs = rootfs.build()
            upstreams.ensure(debs, source.build())
    say(f"upstreams are {arguments.action}")


def change_gpus(arguments: argparse.Namespace) -> None:
    """Change what the simulated GPUs of a node say."""
    check_root()
    host = known_host(arguments.host)
    state = gpu.read_state(host)
    if arguments.reset:
        state = gpu.default_state(host.name)
    for slot in arguments.lose or []:
        state = gpu.change(state, {"present": False}, index=slot)
    changes: dict[str, Any] = {
        key: value
        for key, value in (
            ("name", arguments.model),
            ("memory_mib", arguments.memory_mib),
            ("compute_cap", arguments.compute_cap),
            ("mig", arguments.mig),
            ("sm_clock_mhz", arguments.sm_clock),
            ("temperature_c", arguments.temperature),
            ("ecc_uncorrectable", arguments.ecc_uncorrectable),
            ("remap_pending", arguments.remap_pending),
            ("remap_failure", arguments.remap_failure),
            ("used_mib", arguments.memory_used),
            ("driver_version", arguments.driver),
            ("driver_loaded", False if arguments.no_driver else None),
        )
        if value is not None
    }
    state = gpu.change(state, changes, index=arguments.index)
    gpu.write_state(host, state)
    if arguments.xid is not None:
        line = gpu.xid_line(state, arguments.xid, arguments.index or 0)
        run([*hosts.ssh_command(host), f'sudo logger --tag kernel --priority kern.err -- "{line}"'])
        say(f"{host.name}: journal: {line}")
    say(f"{host.name}: {gpu.summary(state)}")


def hub_faults(arguments: argparse.Namespace) -> None:
    """Make the hub misbehave, as a JSON object says; {} heals it."""
    check_root()
    try:
        faults = hub.check_faults(arguments.faults)
    except ValueError as error:
        raise LabError(f"{arguments.faults}: {error}", changed=False) from error
    write_atomic(upstreams.HUB_FAULTS, json.dumps(faults) + "\n")
    say(f"hub: {json.dumps(faults)}")


def on_off(value: str) -> bool:
    if value not in ("on", "off"):
        raise argparse.ArgumentTypeError("must be on or off")
    return value == "on"


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python3 -m lab", description=__doc__)
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, function: Any) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=function.__doc__, description=function.__doc__)
        sub.set_defaults(function=function)
        return sub

    sub = command("up", up)
    sub.add_argument("--nodes", type=int, default=3, help=f"GPU nodes, 1 to {MAX_NODES} (3)")
    sub.add_argument("--gateways", type=int, default=1, help=f"1 to {MAX_GATEWAYS} (1)")
    anyway = "also a lab that another checkout brought up"
    sub.add_argument("--anyway", action="store_true", help=anyway)
    sub = command("down", down)
    sub.add_argument("--anyway", action="store_true", help=anyway)
    sub.add_argument("--purge", action="store_true", help=f"remove the cache {CACHE} too")
    command("status", status)
    sub = command("shell", shell)
    sub.add_argument("host")
    sub.add_argument("command", nargs="*", help="run this instead of a login shell")
    sub = command("power", power)
    sub.add_argument("host")
    sub.add_argument("action", choices=["off", "on", "cut", "join", "no-ssh", "ssh"])
    sub = command("upstreams", switch_upstreams)
    sub.add_argument("action", choices=["off", "on"])
    sub = command("hub", hub_faults)
    sub.add_argument("faults", help=f"keys: {', '.join(sorted(hub.FAULTS))}")
    sub = command("gpu", change_gpus)
    sub.add_argument("host")
    sub.add_argument("--index", type=int, help="only this GPU (0 to 7, the slot); default: all")
    sub.add_argument("--lose", type=int, action="append", metavar="SLOT", help="GPU is gone")
    sub.add_argument("--model", help='product name, such as "NVIDIA H100 80GB HBM3"')
    sub.add_argument("--memory-mib", type=int, help="total memory in MiB")
    sub.add_argument("--compute-cap", help="compute capability, such as 9.0")
    sub.add_argument("--mig", type=on_off, metavar="on|off")
    sub.add_argument("--sm-clock", type=int, metavar="MHZ", help="a slow GPU; healthy is 1410")
    sub.add_argument("--temperature", type=int, metavar="C", help="from 92 on it slows down")
    sub.add_argument("--ecc-uncorrectable", type=int, metavar="COUNT")
    sub.add_argument("--remap-pending", type=on_off, metavar="on|off")
    sub.add_argument("--remap-failure", type=on_off, metavar="on|off")
    sub.add_argument("--memory-used", type=int, metavar="MIB")
    sub.add_argument("--driver", metavar="VERSION")
    sub.add_argument("--no-driver", action="store_true", help="the driver does not answer")
    sub.add_argument("--xid", type=int, help="write an Xid of this number into the journal")
    sub.add_argument("--reset", action="store_true", help="first back to eight healthy A100s")
    return top


def main() -> int:
    """Exit codes: 0 done, 1 failed on the way, 2 refused with nothing changed."""
    arguments = parser().parse_args()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `lab status | head` ends quietly
    os.umask(0o022)  # folders of the overlays are seen by the users in the hosts
    try:
        return arguments.function(arguments) or 0
    except LabError as error:
        warn(f"lab: {error}")
        return 1 if error.changed else 2
    except KeyboardInterrupt:
        warn("lab: interrupted; run the command again to complete it, or `down` to clean up")
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
