# SPDX-License-Identifier: Apache-2.0
"""Is a host fit to serve, and does it? Preflight, verdicts and reports."""
