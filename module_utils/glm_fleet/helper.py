# SPDX-License-Identifier: Apache-2.0
"""What root does for the daemons of a node. Units start it by this name, which stays for ever."""

from .node.root import main

if __name__ == "__main__":
    raise SystemExit(main())
