# SPDX-License-Identifier: Apache-2.0
"""The root file system all hosts share, and the Debian repository of what they may install."""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
import tempfile
from email.utils import formatdate
from pathlib import Path

from .settings import BRIDGE_ADDRESS, CACHE, FILES_PORT, USER, LabError
from .system import mounts_below, run, say

SUITE = "bookworm"
PACKAGES = (
    "ca-certificates",
    "curl",
    "dbus",
    "iproute2",
    "libnuma1",  # vLLM's CPU build links it
    "openssh-server",
    "procps",
    "python3",
    "python3-apt",
    "sudo",
    "systemd",
    "systemd-sysv",
)
# What a playbook may ask the site's mirror for. Not in the root file system: hosts are bare.
MIRROR_PACKAGES = ("haproxy", "python3-pip", "python3-venv", "rsync", "socat")

MASKED_UNITS = (
    "apt-daily-upgrade.timer",
    "apt-daily.timer",
    "console-getty.service",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "fstrim.timer",
    "getty.target",
    "systemd-networkd.service",
    "systemd-resolved.service",
    "systemd-timesyncd.service",
    "systemd-udevd.service",
)

FILES = {
    "etc/apt/sources.list": f"deb [trusted=yes] http://{BRIDGE_ADDRESS}:{FILES_PORT}/debian ./\n",
    "etc/apt/apt.conf.d/90lab": 'Acquire::Languages "none";\nAPT::Install-Recommends "false";\n',
    "etc/ssh/sshd_config.d/lab.conf": (
        "PermitRootLogin no\nPasswordAuthentication no\nUseDNS no\n"
        "HostKey /etc/ssh/ssh_host_ed25519_key\n"
        # Ansible opens many sessions at once from one address.
        "MaxStartups 200\nMaxSessions 100\n"
    ),
    "etc/systemd/journald.conf.d/lab.conf": "[Journal]\nStorage=persistent\nSystemMaxUse=64M\n",
    # vLLM compiles how it ranks log probabilities at the first request that asks for them. On a GPU
    # that takes the C compiler that preflight looks for; for the CPU it takes one for C++, which no
    # host of the lab has.
    "etc/systemd/system.conf.d/lab.conf": "[Manager]\nDefaultEnvironment=TORCHDYNAMO_DISABLE=1\n",
    f"etc/sudoers.d/{USER}": f"{USER} ALL=(ALL) NOPASSWD: ALL\n",
    "etc/resolv.conf": "",
    "etc/machine-id": "",
    "etc/fstab": "",
}


def recipe_hash() -> str:
    """What identifies the root file system and the repository: everything that goes in."""
    recipe = [SUITE, PACKAGES, MIRROR_PACKAGES, MASKED_UNITS, sorted(FILES.items()), 3]
    return hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:12]


def rootfs_folder() -> Path:
    return CACHE / f"rootfs-{recipe_hash()}"


def debs_folder() -> Path:
    return CACHE / f"debs-{recipe_hash()}"


def host_sources() -> list[str]:
    """The Debian sources of the same release that apt here is configured with.

    Empty when there are none: mmdebstrap then takes its own default.
    """
    wanted = {SUITE, f"{SUITE}-updates", f"{SUITE}-security"}
    listing = run(
        [
            "apt-get",
            "indextargets",
            "--format",
            "$(REPO_URI) $(RELEASE) $(COMPONENT)",
            "Created-By: Packages",
        ],
        check=False,
    )
    found = []
    for line in listing.stdout.splitlines():
        fields = line.split()
        if len(fields) == 3 and fields[1] in wanted and fields[2] == "main":
            found.append(f"deb {fields[0]} {fields[1]} main")
    has_base = any(line.split()[2] == SUITE for line in found)
    return sorted(set(found)) if has_base else []


def build() -> tuple[Path, Path]:
    """Make the root file system and the repository unless they exist; returns both folders."""
    rootfs, debs = rootfs_folder(), debs_folder()
    if rootfs.is_dir() and debs.is_dir():
        return rootfs, debs
    CACHE.mkdir(parents=True, exist_ok=True)
    remove_leftovers()
    say(f"building the Debian root file system ({SUITE}; once, about a minute)")
    work = Path(tempfile.mkdtemp(prefix=".build-rootfs-", dir=CACHE))
    new_root, new_debs = work / "root", work / "debs"
    new_debs.mkdir()
    download = (
        'rm -f "$1"/var/cache/apt/archives/*.deb; '
        'APT_CONFIG="$MMDEBSTRAP_APT_CONFIG" apt-get --yes --download-only '
        f"--no-install-recommends install {' '.join(MIRROR_PACKAGES)} >/dev/null "
        f'&& find "$1/var/cache/apt/archives" -name "*.deb" -exec mv -t {new_debs} {{}} +'
    )
    command = [
        "mmdebstrap",
        "--quiet",
        "--mode=root",
        "--variant=minbase",
        f"--include={','.join(PACKAGES)}",
        # Documentation and translations are a third of the size and nobody reads them here.
        "--dpkgopt=path-exclude=/usr/share/doc/*",
        "--dpkgopt=path-exclude=/usr/share/man/*",
        "--dpkgopt=path-exclude=/usr/share/locale/*",
        f"--customize-hook={download}",
        f'--customize-hook=chroot "$1" useradd --create-home --uid 1000 --shell /bin/bash {USER}',
        '--customize-hook=rm -f "$1"/etc/ssh/ssh_host_*',
        SUITE,
        str(new_root),
    ]
    sources = host_sources()
    run(
        [*command, "-"] if sources else command,
        stdin="".join(line + "\n" for line in sources) if sources else None,
        env={"TMPDIR": str(work)},
    )
    configure(new_root)
    write_index(new_debs)
    # The hosts' overlays hold mode 0755 from their lower root; a private one locks users out.
    new_root.chmod(0o755)
    for new, final in ((new_debs, debs), (new_root, rootfs)):
        if final.exists():
            shutil.rmtree(final)
        new.rename(final)
    shutil.rmtree(work)
    say("root file system and Debian repository are ready")
    return rootfs, debs


def remove_leftovers() -> None:
    """Remove the folders of a build that was killed; their mounts first."""
    for leftover in CACHE.glob(".build-rootfs-*"):
        for point in mounts_below(leftover):
            run(["umount", "--lazy", point])
        shutil.rmtree(leftover)


def configure(root: Path) -> None:
    """Write the lab's configuration into a fresh root file system."""
    for name, content in FILES.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink():
            path.unlink()
        path.write_text(content, encoding="utf-8")
    (root / f"etc/sudoers.d/{USER}").chmod(0o440)
    shutil.rmtree(root / "etc/apt/sources.list.d", ignore_errors=True)
    (root / "etc/apt/sources.list.d").mkdir()
    for unit in MASKED_UNITS:
        link = root / "etc/systemd/system" / unit
        link.unlink(missing_ok=True)
        link.symlink_to("/dev/null")
    default = root / "etc/systemd/system/default.target"
    default.unlink(missing_ok=True)
    default.symlink_to("/lib/systemd/system/multi-user.target")


def write_index(folder: Path) -> None:
    """Write Release and Packages of a flat repository for the .deb files in a folder."""
    stanzas = []
    for path in sorted(folder.glob("*.deb")):
        # apt names an epoch's colon %3a, which an HTTP server would take for an escape.
        path = path.rename(path.with_name(path.name.replace("%3a", "-")))
        control = run(["dpkg-deb", "--field", path]).stdout.strip()
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        stanzas.append(
            f"{control}\nFilename: ./{path.name}\nSize: {path.stat().st_size}\nSHA256: {digest}\n"
        )
    if not stanzas:
        raise LabError(f"no package was downloaded into {folder}; is the Debian mirror reachable?")
    text = "\n".join(stanzas)
    indexes = {"Packages": text.encode(), "Packages.gz": gzip.compress(text.encode(), mtime=0)}
    release = [f"Suite: {SUITE}", f"Date: {formatdate(usegmt=True)}", "SHA256:"]
    for name, content in indexes.items():
        (folder / name).write_bytes(content)
        release.append(f" {hashlib.sha256(content).hexdigest()} {len(content)} {name}")
    (folder / "Release").write_text("\n".join(release) + "\n", encoding="ascii")
