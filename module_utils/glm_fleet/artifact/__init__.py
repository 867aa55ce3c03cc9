# SPDX-License-Identifier: Apache-2.0
"""An artifact: an immutable folder, named by its content, with a manifest."""
