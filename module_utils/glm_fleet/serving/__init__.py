# SPDX-License-Identifier: Apache-2.0
"""One serving engine: its command, deployments, journal, metrics, and its attestation."""
