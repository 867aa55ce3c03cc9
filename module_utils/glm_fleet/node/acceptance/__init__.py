# SPDX-License-Identifier: Apache-2.0
"""The acceptance of a node: do its GPUs compute right and fast, alone and together?"""
