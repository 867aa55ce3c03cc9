# SPDX-License-Identifier: Apache-2.0
"""The release compiler: a ref and pull requests become a verified wheel, lock and environment."""
