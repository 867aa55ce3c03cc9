# SPDX-License-Identifier: Apache-2.0
"""The weights: what a hub offers, fetching it, and taking a folder over as it is."""
