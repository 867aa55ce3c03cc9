# SPDX-License-Identifier: Apache-2.0
"""The readiness agent. Units start it by this name, which stays for ever."""

from .node.readiness import main

if __name__ == "__main__":
    raise SystemExit(main())
