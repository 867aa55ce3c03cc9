# SPDX-License-Identifier: Apache-2.0
"""What every other package uses: errors, processes, files, systemd, text for people.

It knows nothing of Ansible, inventories or playbooks."""
