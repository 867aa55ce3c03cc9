# SPDX-License-Identifier: Apache-2.0
"""Roles say what they take, and the example inventory says nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]
ROLES = sorted(path.name for path in (ROOT / "roles").iterdir() if path.is_dir())


def load(path: Path) -> dict[str, Any]:
    """Return a YAML file's mapping; {} if there is no such file."""
    return (yaml.safe_load(path.read_text()) or {}) if path.exists() else {}


def options(role: str, entry_point: str = "main") -> dict[str, dict[str, Any]]:
    """Return the documented variables of a role."""
    specs = load(ROOT / "roles" / role / "meta/argument_specs.yml")["argument_specs"]
    found: dict[str, dict[str, Any]] = specs[entry_point].get("options", {})
    return found


@pytest.mark.parametrize("role", ROLES)
def test_defaults_are_documented(role: str) -> None:
    documented = {name for name, option in options(role).items() if not option.get("required")}
    assert set(load(ROOT / "roles" / role / "defaults/main.yml")) == documented


@pytest.mark.parametrize("role", ROLES)
def test_options_have_type_and_description(role: str) -> None:
    for name, option in options(role).items():
        assert option.get("type"), f"{name} has no type"
        assert option.get("description"), f"{name} has no description"


@pytest.mark.parametrize("role", ROLES)
def test_documented_defaults_are_the_defaults(role: str) -> None:
    defaults = load(ROOT / "roles" / role / "defaults/main.yml")
    for name, option in options(role).items():
        # A documented default may put an expression into words.
        if "default" in option and "{{" not in str(defaults[name]):
            assert option["default"] == defaults[name], name


def test_the_example_sets_only_variables_of_the_roles() -> None:
    known = {name for role in ROLES for name in options(role)}
    values = load(ROOT / "inventory/example/group_vars/all.yml")
    assert {name for name in values if not name.startswith("ansible_")} <= known


def test_the_example_shows_the_defaults() -> None:
    defaults: dict[str, Any] = {}
    for role in ROLES:
        defaults |= load(ROOT / "roles" / role / "defaults/main.yml")
    for name, value in load(ROOT / "inventory/example/group_vars/all.yml").items():
        if name in defaults and "lookup(" not in str(value):
            assert value == defaults[name], name
