# SPDX-License-Identifier: Apache-2.0
"""How fast a node or the fleet answers."""
