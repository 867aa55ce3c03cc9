# SPDX-License-Identifier: Apache-2.0
"""What runs on a node without Ansible, and what a node tells about itself."""
