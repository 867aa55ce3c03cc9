# SPDX-License-Identifier: Apache-2.0
"""What runs under the release's own Python: its kernels compiled, and interpreted.

These modules need torch and Triton of the release, so they are written out and started with its
interpreter (see `proof.environment`); at import they need the standard library alone.
"""
