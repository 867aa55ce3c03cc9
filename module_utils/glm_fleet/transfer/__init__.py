# SPDX-License-Identifier: Apache-2.0
"""Artifacts travel: torrents, the agent on each node, and who talks to whom."""
