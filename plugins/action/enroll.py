# SPDX-License-Identifier: Apache-2.0
"""Enrolls hosts over SSH from the controller: see library/enroll.py."""

from __future__ import annotations

import logging
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import paramiko
from ansible import constants, context
from ansible.plugins.loader import connection_loader
from ansible.utils.display import Display

sys.path.append(str(Path(__file__).resolve().parents[1] / "plugin_utils"))

from glm_action import ControllerAction
from glm_fleet.core.causes import why_no_answer
from glm_fleet.core.errors import FleetError
from glm_fleet.core.runner import RunResult, run_program
from glm_fleet.fleet.endpoints import host_address, host_key_file, host_port, host_user
from glm_fleet.fleet.enroll import Enrolment, Row, read_target, render_enrolment, sentence
from glm_fleet.fleet.fingerprints import in_dns, read_fingerprints
from glm_fleet.fleet.known_hosts import HostKey, KnownHosts, SshTarget, public_key
from glm_terminal import show, width

# What goes wrong is told in the table; paramiko would print a traceback beside it.
logging.getLogger("paramiko").setLevel(logging.CRITICAL)

_PROGRESS_S = 10.0
_MOST_AT_ONCE = 64
# How long a program that leads to a host may take to say why it ends.
_LAST_WORDS_S = 0.5
_MOST_KEYS = 5  # sshd hangs up after six attempts by default


class ActionModule(ControllerAction):
    """Runs on the controller; reaches hosts by itself, before Ansible can."""

    def act(self, arguments: dict[str, Any], variables: dict[str, Any]) -> dict[str, Any]:
        """Enroll the hosts at once and print the table. ``problem`` says who cannot be used."""
        _, arguments = self.validate_argument_spec(
            argument_spec={
                "hosts": {"type": "list", "elements": "str", "required": True},
                "password": {"type": "str", "default": "", "no_log": True},
                "public_key": {"type": "path"},
                "fingerprints": {"type": "path"},
                "accept_new": {"type": "bool", "default": False},
                "timeout": {"type": "float", "default": 15.0},
            }
        )
        hostvars = variables["hostvars"]
        display = Display()
        try:
            targets = [
                ssh_target(host, hostvars[host], self._play_context.become_pass or "")
                for host in arguments["hosts"]
                if hostvars[host].get("ansible_connection", "ssh") != "local"
            ]
            stated, listed = arguments["public_key"], arguments["fingerprints"]
            confirmed = read_fingerprints(Path(listed)) if listed else {}
            keys = [
                public_key(target, Path(stated) if stated else None, run_program)
                for target in targets
            ]
        except FleetError as error:
            return {"changed": False, "hosts": [], "problem": str(error)}
        enrolment = Enrolment(
            connect=lambda target, kinds: Connection(target, kinds, arguments["timeout"]),
            known=KnownHosts(run_program),
            password=arguments["password"],
            check=self._task.check_mode,
            confirmed=confirmed,
            in_dns=lambda target, key: in_dns(target, key, run_program),
            accept_new=arguments["accept_new"],
        )
        rows = _at_once(enrolment, targets, keys, display)
        show(render_enrolment(rows, width(160)))
        return {
            "changed": any(row.changed for row in rows),
            "hosts": [row.as_dict() for row in rows],
            "problem": sentence(rows),
        }


def ssh_target(host: str, variables: Mapping[str, Any], become_password: str) -> SshTarget:
    """Return how Ansible would reach a host; ``become_password`` was given for the whole run."""

    def value(*names: str) -> str:
        found = [variables.get(name) for name in names]
        return next((str(each) for each in found if each not in (None, "")), "")

    options = context.CLIARGS
    arguments = shlex.split(value("ansible_ssh_args") or _config("ssh_args"))
    for name in ("ansible_ssh_common_args", "ansible_ssh_extra_args"):
        arguments += shlex.split(value(name))
    port = host_port(variables)
    user = host_user(variables) or options.get("remote_user")
    arguments += ["-p", port] if port else []
    arguments += ["-l", user] if user else []
    identity = host_key_file(variables) or options.get("private_key_file") or ""
    return read_target(
        host,
        host_address(variables, host),
        arguments,
        run_program,
        identities=[Path(identity).expanduser()] if identity else [],
        interpreter=value("ansible_python_interpreter") or constants.INTERPRETER_PYTHON,
        become_password=value("ansible_become_password", "ansible_become_pass") or become_password,
        fingerprint=value("enrolment_fingerprint"),
    )


def _config(name: str) -> str:
    """Return a setting of the ssh connection in ansible.cfg."""
    connection_loader.get("ssh", class_only=True)  # makes its settings known
    found = constants.config.get_config_value(name, plugin_type="connection", plugin_name="ssh")
    return str(found or "")


def _at_once(
    enrolment: Enrolment, targets: Sequence[SshTarget], keys: Sequence[str], display: Display
) -> list[Row]:
    with ThreadPoolExecutor(max_workers=max(1, min(len(targets), _MOST_AT_ONCE))) as pool:
        futures = [pool.submit(enrolment.enroll, *each) for each in zip(targets, keys)]
        pending: set[Future[Row]] = set(futures)
        said = time.monotonic()
        while pending:
            _, pending = wait(pending, timeout=1, return_when=FIRST_COMPLETED)
            if pending and time.monotonic() - said >= _PROGRESS_S:
                said = time.monotonic()
                display.display(f"  {len(futures) - len(pending)} of {len(futures)} hosts done")
        return [future.result() for future in futures]


class Connection:
    """One SSH connection. Everything on it together has to end within the time-out."""

    def __init__(self, target: SshTarget, kinds: Sequence[str], timeout: float) -> None:
        self._target = target
        self._timeout = timeout
        self._end = time.monotonic() + timeout
        self._way: Way | None = None
        begun = time.perf_counter()
        sock = self._dial()
        self.latency_s = time.perf_counter() - begun
        self._transport = paramiko.Transport(sock)
        try:
            self._transport.banner_timeout = self._transport.auth_timeout = self._left()
            security = self._transport.get_security_options()
            # As ssh does: a server with several keys is asked for the one that is known.
            known = [each for each in security.key_types if _kind(each) in kinds]
            security.key_types = (
                [*known, *(set(security.key_types) - set(known))] if known else (security.key_types)
            )
            self._transport.start_client(timeout=self._left())
            key = self._transport.get_remote_server_key()
        except (OSError, EOFError, paramiko.SSHException) as error:
            silent = self._silent(error)
            self.close()
            raise silent from error
        if target.proxy:
            # Through a proxy there is no handshake of our own to time.
            self.latency_s = time.perf_counter() - begun
        self.host_key = HostKey(key.get_name(), key.get_base64())

    def login_with_key(self) -> bool:
        """Try the operator's keys, those of the inventory first."""
        for key in self._keys()[:_MOST_KEYS]:
            try:
                self._transport.auth_timeout = self._left()
                if not self._transport.auth_publickey(self._target.user, key):
                    return True
            except paramiko.BadAuthenticationType:
                return False
            except paramiko.AuthenticationException:
                continue
            except (OSError, EOFError, paramiko.SSHException) as error:
                raise self._silent(error) from error
        return False

    def login_with_password(self, password: str) -> bool:
        """Log in with a password, also where the server asks for it in a dialogue."""
        try:
            self._transport.auth_timeout = self._left()
            return not self._transport.auth_password(self._target.user, password)
        except paramiko.BadAuthenticationType as error:
            raise FleetError(
                "it takes no passwords",
                found=f"allowed: {', '.join(error.allowed_types)}",
                remedy="add your public key there by hand",
            ) from error
        except paramiko.AuthenticationException:
            return False
        except (OSError, EOFError, paramiko.SSHException) as error:
            raise self._silent(error) from error

    def run(self, command: str, input_text: str = "") -> RunResult:
        """Run a command in the user's shell."""
        try:
            channel = self._transport.open_session(timeout=self._left())
            channel.settimeout(self._left())
            channel.exec_command(command)
            if input_text:
                channel.sendall(input_text.encode())
            channel.shutdown_write()
            stdout = channel.makefile("rb").read()
            stderr = channel.makefile_stderr("rb").read()
            if not channel.status_event.wait(self._left()):
                raise TimeoutError
            rc = channel.recv_exit_status()
        except (OSError, EOFError, paramiko.SSHException) as error:
            raise self._silent(error) from error
        return RunResult(rc, stdout.decode(errors="replace"), stderr.decode(errors="replace"))

    def close(self) -> None:
        """Hang up."""
        self._transport.close()
        if self._way:
            self._way.close()

    def _left(self) -> float:
        return max(self._end - time.monotonic(), 0.1)

    def _dial(self) -> Any:
        if self._target.proxy:
            self._way = Way(self._target.proxy)
            return self._way.socket
        where = (self._target.address, self._target.port)
        try:
            return socket.create_connection(where, timeout=self._left())
        except socket.gaierror as error:
            raise FleetError(
                f"the name {self._target.address} cannot be resolved",
                remedy="correct ansible_host, or the name service",
            ) from error
        except ConnectionRefusedError as error:
            raise FleetError(
                f"it refuses connections to port {self._target.port}",
                remedy="start sshd there, or correct ansible_port",
            ) from error
        except TimeoutError as error:
            raise self._silent(error) from error
        except OSError as error:
            raise FleetError(
                "it cannot be reached",
                found=str(error),
                remedy="check its address, power and network",
            ) from error

    def _silent(self, error: Exception) -> FleetError:
        refused = self._way.problem() if self._way else None
        if refused:
            return refused
        if time.monotonic() >= self._end or isinstance(error, TimeoutError):
            return FleetError(
                f"it does not answer within {self._timeout:g} s",
                remedy="check its address, power and network, and firewalls on the way",
            )
        return FleetError(
            "SSH with it breaks off",
            found=f"{type(error).__name__} {error}".strip(),
            remedy="check that an SSH server listens on that port",
        )

    def _keys(self) -> list[paramiko.PKey]:
        keys: list[paramiko.PKey] = []
        for path in self._target.identities:
            try:
                keys.append(paramiko.PKey.from_path(path))
            except (OSError, ValueError, TypeError, paramiko.SSHException, paramiko.UnknownKeyType):
                continue  # not there, of a kind we do not know, or for the agent to open
        if self._target.use_agent:
            keys += paramiko.Agent().get_keys()
        return keys


class Way:
    """A program that leads to a host, such as ssh through jump hosts, and what it complains of.

    Not paramiko's: that one does not notice when the program ends, and drops what it says.
    """

    def __init__(self, command: str) -> None:
        self.socket, theirs = socket.socketpair()
        # Closed with the way: it is read when the program has ended.
        self._words = tempfile.TemporaryFile()  # noqa: SIM115
        with theirs:
            self._process = subprocess.Popen(
                ["/bin/sh", "-c", f"exec {command}"],
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
                stderr=self._words,
                start_new_session=True,
            )

    def problem(self) -> FleetError | None:
        """Return why the way does not lead there; None while its program runs."""
        try:
            status = self._process.wait(timeout=_LAST_WORDS_S)
        except subprocess.TimeoutExpired:
            return None
        self._words.seek(0)
        said = self._words.read().decode(errors="replace").strip()
        known = why_no_answer(said)
        return FleetError(
            "the way to it through its jump host is closed"
            + (f": {known.cause.replace('its jump host', 'the jump host')}" if known else ""),
            found=said.splitlines()[-1][-200:] if said else f"it ended with {status}",
            remedy=(known.remedy if known else "try the same ssh by hand, with -v")
            + "; a jump host that is new has to be known to ssh first",
        )

    def close(self) -> None:
        """End the program."""
        self.socket.close()
        self._process.kill()
        self._process.wait()
        self._words.close()


def _kind(algorithm: str) -> str:
    """Return the type under which known_hosts lists the keys of an algorithm."""
    return "ssh-rsa" if algorithm.startswith("rsa-sha2-") else algorithm
