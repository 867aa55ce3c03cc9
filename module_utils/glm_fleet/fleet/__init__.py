# SPDX-License-Identifier: Apache-2.0
"""The fleet as a whole: inventory, lock, rollouts, enrolment."""
