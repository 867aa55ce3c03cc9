# SPDX-License-Identifier: Apache-2.0
"""What the tools of a host say, turned into a cause and a next step.

ssh, sudo, Python, the file system and nvidia-smi each have their own words for what is wrong,
and Ansible wraps them in its own. Every report asks here, so that a sentence of theirs leads to
the same words of ours. The tests hold a real sentence for each.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_ENROLL = "run playbooks/enroll.yml"
# What a controller needs of sudo to run without a password: the form of every command of Ansible.
SUDOERS = "{user} ALL=(root) NOPASSWD: /bin/sh -c echo BECOME-SUCCESS-[a-z]* ; *"


@dataclass(frozen=True)
class Cause:
    """Why something went wrong, and what to do about it."""

    cause: str
    remedy: str


@dataclass(frozen=True)
class _Sentence:
    """Words of a tool. ``cause`` and ``remedy`` may name the groups of ``pattern``, and
    {host} and {user}."""

    pattern: str
    cause: str
    remedy: str


# The first that fits counts: what explains stands before what follows from it.
_SSH = (
    _Sentence(
        r"REMOTE HOST IDENTIFICATION HAS CHANGED|[Hh]ost key for (?P<name>\S+) has changed"
        r"|differs from the key for the IP address",
        "its host key is not the one that is known",
        "find out why before you go on: another host may answer at this address; if {host} was "
        "installed anew, remove its key with ssh-keygen -R and " + _ENROLL,
    ),
    _Sentence(
        r"[Hh]ost key revoked|revoked host key",
        "its host key is revoked",
        "give the host a new key, then " + _ENROLL,
    ),
    _Sentence(
        r"[Hh]ost key is known for|Host key verification failed|authenticity of host .* can't be",
        "its host key is not known here yet",
        _ENROLL + ", which shows the key and remembers it",
    ),
    _Sentence(
        r"UNPROTECTED PRIVATE KEY FILE|bad permissions",
        "ssh refuses the private key, because others can read its file",
        "chmod 600 the file that ssh names",
    ),
    _Sentence(
        r'Load key "?(?P<file>[^":]+)"?: (?P<why>[^\n]+)',
        "ssh cannot read the private key {file} ({why})",
        "correct ansible_ssh_private_key_file, or load the key into an agent if it has a "
        "passphrase",
    ),
    _Sentence(
        r"Too many authentication failures",
        "ssh offered too many keys before the right one",
        "name the key in ansible_ssh_private_key_file and set IdentitiesOnly=yes in "
        "ansible_ssh_common_args",
    ),
    _Sentence(
        r"no matching (?P<what>host key type|key exchange method|cipher|MAC) found",
        "ssh and its server have no {what} in common",
        "update the older of the two; what each offers is in ssh -v",
    ),
    _Sentence(
        r"Could not resolve hostname (?P<name>\S+?):|[Nn]ame or service not known"
        r"|Temporary failure in name resolution|nodename nor servname",
        "its name cannot be resolved",
        "correct ansible_host or the name of the jump host, or the name service",
    ),
    _Sentence(
        r"channel \d+: open failed|stdio forwarding failed|administratively prohibited",
        "its jump host does not let us through to it",
        "on the jump host: see AllowTcpForwarding, and whether it reaches {host}",
    ),
    _Sentence(
        r"Permission denied \((?P<kinds>[^)]*)\)|Authentication failed|Permission denied, please "
        r"try",
        "it takes none of your keys",
        _ENROLL + " and give the password once, or correct ansible_user",
    ),
    _Sentence(
        r"Connection refused",
        "it refuses connections",
        "start sshd there, or correct ansible_host and ansible_port",
    ),
    _Sentence(
        r"No route to host|Network is unreachable",
        "no way leads to it",
        "check its address, power and network, and firewalls on the way",
    ),
    _Sentence(
        r"[Cc]onnection timed out|Operation timed out|[Tt]imed? ?out (?:during|waiting for) "
        r"(?:banner|connection)|did not respond",
        "it does not answer in time",
        "check its address, power and network, and firewalls on the way",
    ),
    _Sentence(
        r"kex_exchange_identification|Connection (?:reset|closed) by|Broken pipe|closed by remote",
        "it hung up before ssh could log in",
        "look at the log of sshd there (MaxStartups, a full disk, a host that is going down), "
        "then try again",
    ),
)

_SUDO = (
    _Sentence(
        r"you must have a tty to run sudo",
        "sudo there wants a terminal (requiretty)",
        "add `Defaults:{user} !requiretty` there with visudo",
    ),
    _Sentence(
        r"[Ii]ncorrect (?:sudo|become|su|doas) password|Sorry, try again|incorrect password attempt"
        r"|\d+ incorrect password|no password was provided|Duplicate become password prompt",
        "the become password is wrong for {user} there",
        "correct ansible_become_password (or what you typed for --ask-become-pass)",
    ),
    _Sentence(
        r"[Mm]issing (?:sudo|become|su|doas) password|a password is required"
        r"|no tty present and no askpass|terminal is required to read the password"
        r"|password is required to run sudo",
        "sudo there asks {user} for a password, and none is given",
        f"set ansible_become_password from a vault, or allow it without one, by `{SUDOERS}` in "
        "/etc/sudoers.d",
    ),
    # Over a connection that was there already, a host whose network is gone looks like this too.
    _Sentence(
        r"[Tt]imeout .*waiting for privilege escalation",
        "nothing came back after the login: the host or its network is gone, or sudo there asks "
        "{user} for a password",
        "check its power and network; if it answers to ssh, set ansible_become_password from a "
        f"vault, or allow sudo without one, by `{SUDOERS}` in /etc/sudoers.d",
    ),
    _Sentence(
        r"is not in the sudoers file|is not allowed to (?:execute|run)|may not run sudo"
        r"|not permitted to",
        "{user} may not use sudo there",
        f"allow it, by `{SUDOERS}` in /etc/sudoers.d",
    ),
    _Sentence(
        r"sudo: (?:command )?not found|(?:sudo|env): not found|sudo: No such file",
        "there is no sudo there",
        "install sudo, or set ansible_become_method, or log in as root",
    ),
    _Sentence(
        r"effective uid is not 0|must be owned by uid 0|no new privileges",
        "sudo there has lost its right to become root",
        "in a container or a unit: allow new privileges; else install sudo again",
    ),
    _Sentence(
        r"account validation failure|Account expired|password (?:has )?expired|PAM account "
        r"management"
        r"|change your password",
        "the account of {user} there has expired",
        "renew it there with chage or passwd",
    ),
    _Sentence(
        r"/etc/sudoers\S*(?::\d+)?.*(?:syntax error|parse error)|parse error in /etc/sudoers",
        "the rules of sudo there have a mistake",
        "correct them as root with visudo -c",
    ),
)

_PYTHON = (
    _Sentence(
        r"(?P<path>/[\w./+-]*python[\d.]*)(?:'|\")?(?::| was| is)? (?:command )?(?:not found|"
        r"No such file or directory)|(?:interpreter|python\S*).{0,40}(?:not found|could not be "
        r"found)"
        r"|env: .?python[\d.]*.?: No such file",
        "the Python that is named for it is not there",
        "install python3 there, or correct ansible_python_interpreter",
    ),
    _Sentence(
        r"SyntaxError|ansible-core requires a minimum of Python",
        "its Python is too old",
        "install Python 3.10 or newer there and name it in ansible_python_interpreter",
    ),
)

_STORAGE = (
    _Sentence(
        r"No space left on device: '?(?P<path>/[^'\n]+?)'?(?:$|[\s;,)])",
        "the disk that holds {path} is full",
        "on {host}: see df -h and df -i, remove old artifacts or logs, then run again",
    ),
    _Sentence(
        r"(?P<path>/\S+?)'?: [^\n]{0,60}No space left on device",
        "the disk that holds {path} is full",
        "on {host}: see df -h and df -i, remove old artifacts or logs, then run again",
    ),
    _Sentence(
        r"No space left on device|Errno 28\b|Disk quota exceeded|Errno 122\b",
        "a disk there is full",
        "on {host}: see df -h and df -i (/, /tmp, the home folder and /var first), remove old "
        "artifacts or logs, then run again",
    ),
    _Sentence(
        r"Read-only file system",
        "a file system there is mounted read-only",
        "look at dmesg for errors of the disk, repair it, and mount it again",
    ),
    _Sentence(
        r"Failed to create temporary directory",
        "Ansible cannot make its folder there",
        "see whether the home folder of {user} exists, can be written to and has room (df -h, df "
        "-i)",
    ),
    _Sentence(
        r"Cannot allocate memory|Errno 12\b|fork: retry",
        "there is no memory left there",
        "see what uses it: ps -e --sort=-rss",
    ),
)

_DRIVER = (
    _Sentence(
        r"Driver/library version mismatch(?:[^\n]*\s+NVML library version: (?P<library>[\d.]+))?",
        "the driver was updated while its old kernel module is loaded: nvidia-smi and the module "
        "are of two versions",
        "drain the node and reboot it (nothing needs to be installed), and hold the driver's "
        "packages so that they change only in a maintenance",
    ),
    _Sentence(
        r"couldn't communicate with the NVIDIA driver|NVIDIA driver is not loaded|Driver Not Loaded"
        r"|nvidia-smi has failed because",
        "the kernel module of the driver is not loaded",
        "run modprobe nvidia there and read dmesg; after a kernel update the module has to be "
        "built again (dkms status), then reboot",
    ),
    _Sentence(
        r"GPU is lost|fallen off the bus",
        "a GPU fell off the bus",
        "drain the node and reboot it; have the board looked at if it happens again",
    ),
    _Sentence(
        r"Unable to determine the device handle for (?:GPU|gpu) ?(?P<gpu>[0-9A-Fa-f:.]+)",
        "the driver has lost the GPU {gpu}",
        "read dmesg for its Xid, then drain the node and reboot it",
    ),
    _Sentence(
        r"No devices were found",
        "the driver finds no GPU",
        "see lspci -d 10de: for the boards and dmesg for the reason, then reboot or power-cycle",
    ),
    _Sentence(
        r"[Ii]nsufficient [Pp]ermissions",
        "nvidia-smi may not use the GPUs",
        "see who owns /dev/nvidia* there",
    ),
    _Sentence(
        r"nvidia-smi (?:is missing|did not end|gave no answer)|nvidia-smi: (?:command )?not found",
        "nvidia-smi gives no answer",
        "install or repair the NVIDIA driver; see dmesg, and reboot if it names a GPU",
    ),
)


def why_no_answer(text: str, *, host: str = "the host", user: str = "the user") -> Cause | None:
    """Explain why a host could not be reached or asked, from what ssh, sudo, Python or Ansible
    said; None for words that are not known."""
    # A full disk or memory also keeps sudo and Python from working; ssh comes before both.
    return _explain(text, (*_STORAGE, *_SSH, *_SUDO, *_PYTHON), host, user)


def why_no_sudo(text: str, *, user: str) -> Cause | None:
    """Explain why sudo did not do what it was asked."""
    return _explain(text, (*_SUDO, *_STORAGE), "the host", user)


def why_no_driver(text: str) -> Cause | None:
    """Explain what nvidia-smi complains of."""
    return _explain(text, _DRIVER, "the host", "the user")


def _explain(text: str, sentences: tuple[_Sentence, ...], host: str, user: str) -> Cause | None:
    for each in sentences:
        # Ansible breaks lines where it likes.
        found = re.search(each.pattern, text) or re.search(each.pattern, " ".join(text.split()))
        if found:
            words = {"host": host, "user": user, **found.groupdict(default="")}
            return Cause(_filled(each.cause, words), _filled(each.remedy, words))
    return None


def _filled(text: str, words: dict[str, str]) -> str:
    # Not str.format: a sentence of a shell may hold braces of its own.
    for name, value in words.items():
        text = text.replace(f"{{{name}}}", value.strip())
    return text
