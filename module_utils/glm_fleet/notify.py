# SPDX-License-Identifier: Apache-2.0
"""Messages about what a health check found. Units start it by this name, which stays for ever."""

from .health.notify import main

if __name__ == "__main__":
    raise SystemExit(main())
