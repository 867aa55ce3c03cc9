#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Documentation of an action plugin: the work is in plugins/action/enroll.py."""

from __future__ import annotations

DOCUMENTATION = r"""
module: enroll
short_description: Reaches hosts for the first time and makes them usable for Ansible
version_added: "0.1.0"
description:
  - Runs on the controller, once for all hosts, side by side, with paramiko, and needs no
    connection of Ansible's. Address, port, user, keys, known_hosts and jump host are those
    that ssh would use with the host's variables.
  - Pins the key of a host that has none in known_hosts, if somebody confirmed it. This is the
    C(enrolment_fingerprint) of the host, a line of O(fingerprints), or an SSHFP record in a
    signed zone of the DNS, which ssh asks for. Any other key is refused before anything is sent,
    and so is one that changed or is revoked.
  - Where none of the operator's keys is accepted, logs in with the password and adds the
    public key to the user's C(authorized_keys).
  - Checks that the user may use sudo and that the interpreter is Python 3.9 or newer.
  - Prints a table of all hosts, and never fails because of a host; see RV(problem).
author: "glm-fleet contributors (@glm-fleet)"
requirements: [paramiko, "ssh and ssh-keygen of OpenSSH"]
attributes:
  check_mode:
    description: Reaches the hosts and logs in with keys; pins nothing, installs nothing and
      sends no password.
    support: full
  diff_mode:
    description: What is pinned and installed is in the table.
    support: none
  idempotent:
    description: A host that is known and takes the key is not changed.
    support: full
options:
  hosts:
    description: Hosts of the inventory. Those with C(ansible_connection=local) are left out.
    type: list
    elements: str
    required: true
  password:
    description: Password of the user on the hosts. Empty installs no key.
    type: str
    default: ""
  public_key:
    description: Path of the public key to install. If not given, the one of the first private
      key that ssh would use.
    type: path
  fingerprints:
    description: Path of a file with the fingerprints of hosts. Each line is a host's name or
      address, then its fingerprint as C(ssh-keygen -l) shows it, or its key as known_hosts has it.
    type: path
  accept_new:
    description: Take whichever key a host shows first, and send it the passwords.
    type: bool
    default: false
  timeout:
    description: Seconds for everything on one connection. A host takes three at most.
    type: float
    default: 15
"""

EXAMPLES = r"""
- name: Enroll every host
  enroll:
    hosts: "{{ ansible_play_hosts_all }}"
    password: "{{ enrolment_password }}"
  register: enrolment
  run_once: true
  no_log: true
"""

RETURN = r"""
hosts:
  description:
    - For each host C(host), C(address), C(latency_ms), C(fingerprint), C(host_key) (known,
      pinned, or in check mode new or unconfirmed), C(login) (key, key installed, or key to be
      installed in check mode), C(sudo), C(python), C(changed), C(problem) (empty if usable),
      C(remedy).
  returned: always
  type: list
  elements: dict
problem:
  description: One sentence that names the hosts that cannot be used; empty if all can.
  returned: always
  type: str
"""

from ansible.module_utils.basic import AnsibleModule


def main() -> None:
    """Say why this cannot be run as a module."""
    module = AnsibleModule(argument_spec={}, supports_check_mode=True)
    module.fail_json(
        msg="enroll runs on the controller. Expected: action_plugins in ansible.cfg names "
        "plugins/action. What to do: run ansible-playbook in the repository's root."
    )


if __name__ == "__main__":
    main()
