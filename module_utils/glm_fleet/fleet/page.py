# SPDX-License-Identifier: Apache-2.0
"""How the HTML pages of reports are made, on the controller: it needs Jinja2."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

# What all pages look like, beside the roles of their templates.
_SHARED = "common/templates"


def render(template: Path, values: Mapping[str, Any]) -> str:
    """Return the page that a role's template makes of values; every text is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, template.parents[2] / _SHARED]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template.name).render(values)
