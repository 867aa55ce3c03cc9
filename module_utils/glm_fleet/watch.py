# SPDX-License-Identifier: Apache-2.0
"""The watchdog. Units start it by this name, which stays for ever."""

from .node.watchdog import main

if __name__ == "__main__":
    raise SystemExit(main())
