# SPDX-License-Identifier: Apache-2.0
"""The agent that takes and gives artifacts. Units start it by this name, which stays for ever."""

from .transfer.control import main

if __name__ == "__main__":
    raise SystemExit(main())
