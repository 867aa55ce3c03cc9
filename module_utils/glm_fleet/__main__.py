# SPDX-License-Identifier: Apache-2.0
"""Starts an entry point by its name, with nothing taken from folder, environment or home.

    python3 -I -B /opt/glm-fleet/lib/glm_fleet gate --user glm

``python3 -m glm_fleet.gate`` imports from the folder it is started in, from ``PYTHONPATH`` and
from the user's own packages. A unit that runs as root must not: whoever can write there would
be root. With ``-I`` none of them counts, and a folder that is run is the first on the path.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

ENTRIES = ("gate", "helper", "notify", "sentry", "swarm", "watch")


def main() -> None:
    """Run the module that the first argument names, with the arguments that follow."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in ENTRIES:
        sys.exit(f"expected one of {', '.join(ENTRIES)} as first argument, found {name!r}")
    del sys.argv[1]
    # The folder above this package instead of the package itself.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    runpy.run_module(f"glm_fleet.{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
