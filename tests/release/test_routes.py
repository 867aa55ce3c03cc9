# SPDX-License-Identifier: Apache-2.0
"""The routes of vLLM's application, read from its source: what the gateway keeps from clients."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import yaml

from .conftest import RELEASES, Upstream

ROOT = Path(__file__).resolve().parents[2]
KNOWN = ROOT / "tests/unit/fixtures/vllm-routes.txt"
_METHODS = ("get", "post", "put", "delete", "patch", "websocket")
_MOUNTS = ("Mount", "mount", "Route", "add_route", "add_api_route", "add_websocket_route")


def routes(tree: Path) -> set[str]:
    """Return 'METHOD /path' of each route below a release's entry points, ANY for a mount."""
    sources = (tree / "vllm/entrypoints").rglob("*.py")
    return {route for path in sources for route in _routes(ast.parse(path.read_text()))}


def _routes(module: ast.Module) -> Iterator[str]:
    for node in ast.walk(module):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        first = node.args[0]
        path = first.value if isinstance(first, ast.Constant) else None
        if not isinstance(path, str) or not path.startswith("/"):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        name = name or (node.func.id if isinstance(node.func, ast.Name) else "")
        if name in _METHODS and isinstance(node.func, ast.Attribute):
            yield f"{name.upper()} {path}"
        elif name in _MOUNTS:
            yield f"ANY {path}"


def test_every_route_of_the_releases_is_known(upstream: Upstream) -> None:
    """The test of the front door asks for each of them with a key and without one."""
    found = {route for version in RELEASES for route in routes(upstream.path.parent / version)}
    assert sorted(found) == KNOWN.read_text().splitlines(), "write them down, and think of each"


def test_what_clients_may_ask_exists(upstream: Upstream) -> None:
    defaults = yaml.safe_load((ROOT / "roles/gateway/defaults/main.yml").read_text())
    assert set(defaults["gateway_paths"]) <= routes(upstream.path.parent / "0.23.0")
