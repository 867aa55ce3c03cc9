# SPDX-License-Identifier: Apache-2.0
"""HAProxy: its runtime interface, states of servers, drains."""
