# SPDX-License-Identifier: Apache-2.0
"""The pre-start check of the serving unit. Units start it by this name, which stays for ever."""

from .node.prestart import main

if __name__ == "__main__":
    raise SystemExit(main())
