# SPDX-License-Identifier: Apache-2.0
"""Real sentences of ssh, sudo, Python, the file system and nvidia-smi, and what they mean."""

from __future__ import annotations

from pathlib import Path

import pytest
from glm_fleet.core.causes import why_no_answer, why_no_driver, why_no_sudo

CASES = Path(__file__).parents[1] / "fixtures/cases"
_SHELL = "Failed to connect to the host via ssh: "

CHANGED = """@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@
@    WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!     @
@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@
IT IS POSSIBLE THAT SOMEONE IS DOING SOMETHING NASTY!
Host key for 10.0.2.9 has changed and you have requested strict checking.
Host key verification failed."""


@pytest.mark.parametrize(
    ("said", "cause", "remedy"),
    [
        (_SHELL + CHANGED, "its host key is not the one that is known", "ssh-keygen -R"),
        (
            "No ED25519 host key is known for 10.0.2.9 and you have requested strict checking.\n"
            "Host key verification failed.",
            "its host key is not known here yet",
            "enroll.yml",
        ),
        (
            "ops@10.0.2.9: Permission denied (publickey,password).",
            "takes none of your keys",
            "enroll",
        ),
        (
            "ssh: Could not resolve hostname gpu01: Name or service not known",
            "its name cannot be resolved",
            "ansible_host",
        ),
        (
            "ssh: connect to host 10.0.2.9 port 22: Connection refused",
            "it refuses connections",
            "start sshd",
        ),
        (
            "ssh: connect to host 10.0.2.9 port 22: No route to host",
            "no way leads to it",
            "network",
        ),
        (
            "ssh: connect to host 10.0.2.9 port 22: Connection timed out",
            "does not answer in time",
            "firewalls",
        ),
        (
            "channel 0: open failed: connect failed: No route to host\nstdio forwarding failed",
            "its jump host does not let us through",
            "AllowTcpForwarding",
        ),
        (
            "kex_exchange_identification: Connection closed by remote host",
            "it hung up before ssh could log in",
            "MaxStartups",
        ),
        (
            "Unable to negotiate with 10.0.2.9 port 22: no matching host key type found. Their "
            "offer: ssh-rsa",
            "have no host key type in common",
            "update",
        ),
        (
            "Received disconnect from 10.0.2.9 port 22:2: Too many authentication failures",
            "offered too many keys",
            "IdentitiesOnly",
        ),
        (
            'Load key "/home/ops/.ssh/id": invalid format',
            "cannot read the private key /home/ops/.ssh/id",
            "ansible_ssh_private_key_file",
        ),
        ("Missing sudo password", "asks ops for a password, and none is given", "NOPASSWD"),
        ("sudo: a password is required", "asks ops for a password", "ansible_become_password"),
        (
            "Incorrect sudo password",
            "the become password is wrong for ops",
            "ansible_become_password",
        ),
        (
            "Sorry, try again.\nsudo: no password was provided\nsudo: 1 incorrect password attempt",
            "the become password is wrong for ops",
            "correct ansible_become_password",
        ),
        (
            "sudo: sorry, you must have a tty to run sudo",
            "sudo there wants a terminal (requiretty)",
            "`Defaults:ops !requiretty`",
        ),
        (
            "sudo: a terminal is required to read the password; either use the -S option to read "
            "from standard input or configure an askpass helper\nsudo: a password is required",
            "asks ops for a password, and none is given",
            "NOPASSWD",
        ),
        (
            "sudo: no tty present and no askpass program specified",
            "asks ops for a password, and none is given",
            "NOPASSWD",
        ),
        (
            "ops is not in the sudoers file.  This incident will be reported.",
            "ops may not use sudo there",
            "/etc/sudoers.d",
        ),
        ("/bin/sh: 1: sudo: not found", "there is no sudo there", "install sudo"),
        (
            "Timeout (12s) waiting for privilege escalation prompt: ",
            "the host or its network is gone, or sudo there asks ops for a password",
            "check its power and network",
        ),
        (
            "/bin/sh: 1: /usr/bin/python3: not found",
            "the Python that is named for it is not there",
            "ansible_python_interpreter",
        ),
        (
            "The module interpreter '/opt/py/bin/python3' was not found.",
            "the Python that is named for it is not there",
            "ansible_python_interpreter",
        ),
        (
            "Failed to create temporary directory. mkdir: cannot create directory "
            "'/home/ops/.ansible/tmp/x': No space left on device",
            "the disk that holds /home/ops/.ansible/tmp/x is full",
            "df -h",
        ),
        (
            "OSError: [Errno 28] No space left on device: '/tmp/ansible_x'",
            "the disk that holds /tmp/ansible_x is full",
            "on gpu01: see df -h",
        ),
        ("[Errno 28] No space left on device", "a disk there is full", "/var first"),
        ("mkdir: cannot create directory: Read-only file system", "mounted read-only", "dmesg"),
    ],
)
def test_why_a_host_gives_no_answer(said: str, cause: str, remedy: str) -> None:
    found = why_no_answer(said, host="gpu01", user="ops")
    assert found is not None, said
    assert cause in found.cause
    assert remedy in found.remedy
    assert "{" not in found.cause + found.remedy


def test_words_that_are_not_known_stay_as_they_are() -> None:
    assert why_no_answer("the moon is full") is None
    assert (
        why_no_sudo("sudo: unable to resolve host gpu01: Name or service not known", user="o")
        is None
    )


@pytest.mark.parametrize(
    ("said", "cause", "remedy"),
    [
        ((CASES / "07-driver-library-mismatch/nvidia-smi.out").read_text(), "updated", "reboot it"),
        (
            "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make "
            "sure that the latest NVIDIA driver is installed and running.",
            "kernel module of the driver is not loaded",
            "dkms",
        ),
        ("No devices were found", "finds no GPU", "lspci"),
        (
            "Unable to determine the device handle for GPU0000:47:00.0: GPU is lost.  Reboot the "
            "system to recover this GPU",
            "fell off the bus",
            "reboot",
        ),
        (
            "Unable to determine the device handle for GPU0000:47:00.0: Unknown Error",
            "lost the GPU 0000:47:00.0",
            "dmesg",
        ),
        ("The program nvidia-smi is missing", "gives no answer", "install or repair"),
    ],
)
def test_why_nvidia_smi_complains(said: str, cause: str, remedy: str) -> None:
    found = why_no_driver(said)
    assert found is not None
    assert cause in found.cause
    assert remedy in found.remedy
