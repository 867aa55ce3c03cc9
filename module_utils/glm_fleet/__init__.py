# SPDX-License-Identifier: Apache-2.0
"""The logic of glm-fleet: typed Python that knows nothing of Ansible."""

__version__ = "0.2.0"
