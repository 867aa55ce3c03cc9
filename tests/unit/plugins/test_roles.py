# SPDX-License-Identifier: Apache-2.0
"""Roles say what they take, and the example inventory says nothing else."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]
ROLES = sorted(path.name for path in (ROOT / "roles").iterdir() if path.is_dir())


@functools.cache
def load(path: Path) -> dict[str, Any]:
    """Return a YAML file's mapping; {} if there is no such file."""
    return (yaml.safe_load(path.read_text()) or {}) if path.exists() else {}


def options(role: str) -> dict[str, dict[str, Any]]:
    """Return the documented variables of a role; `common` has no entry point that is called."""
    specs = load(ROOT / "roles" / role / "meta/argument_specs.yml")["argument_specs"]
    entry_point = "defaults" if role == "common" else "main"
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


def texts(role: str) -> Iterator[tuple[Path, str]]:
    """Return the files of a role in which variables are read."""
    for path in sorted((ROOT / "roles" / role).rglob("*")):
        if path.suffix in (".yml", ".j2") and path.parent.name != "meta":
            yield path, path.read_text()


@pytest.mark.parametrize("role", ROLES)
def test_a_role_reads_no_private_fact_of_another(role: str) -> None:
    others = "|".join(each for each in ROLES if each != role)
    for path, text in texts(role):
        found = re.findall(rf"\b__(?:{others})_\w+", text)
        assert not found, f"{path.relative_to(ROOT)} reads {', '.join(sorted(set(found)))}"


@pytest.mark.parametrize("role", ROLES)
def test_a_default_has_one_source(role: str) -> None:
    """A variable of another role is one of `common`, whose default is not written again."""
    own, common = options(role), options("common")
    for path, text in texts(role):
        where = path.relative_to(ROOT)
        for name in re.findall(r"\b(\w+) \| default\((?:'[^']+'|\"[^\"]+\"|[\d.]+)", text):
            assert name not in common, f"{where} has a default for {name}, as roles/common has"
        read = set(re.findall(r"(?<![\w.])(\w+)\b(?!:)", re.sub("(?m)#.*$", "", text)))
        others = read & {name for each in ROLES for name in options(each)} - set(own) - set(common)
        assert not others, (
            f"{where} reads {', '.join(others)} of another role: put the default into roles/common"
        )


def test_whoever_reads_a_common_variable_depends_on_common() -> None:
    def known(role: str) -> set[str]:
        needed = load(ROOT / "roles" / role / "meta/main.yml").get("dependencies", [])
        return {role}.union(*(known(each["role"]) for each in needed))

    for role in ROLES:
        for path, text in texts(role):
            read = set(re.findall(r"(?<![\w.])(\w+)\b", text)) & set(options("common"))
            assert not read or "common" in known(role), f"{path.relative_to(ROOT)} reads {read}"


PLAYS = [ROOT / "site.yml", *sorted((ROOT / "playbooks").glob("*.yml"))]


@pytest.mark.parametrize("path", PLAYS, ids=lambda path: path.name)
def test_what_a_play_says_is_heard_by_the_roles(path: Path) -> None:
    """Variables of a role outrank those of a play: what stands in both is what the role says."""
    of_roles = {name for role in ROLES for name in load(ROOT / "roles" / role / "vars/main.yml")}
    said = {name for play in yaml.safe_load(path.read_text()) for name in play.get("vars", {})}
    assert said & of_roles == set()


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
