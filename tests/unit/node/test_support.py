# SPDX-License-Identifier: Apache-2.0
"""What is gathered for others holds no secret, and what is missing is no failure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from glm_fleet.core.errors import FleetError
from glm_fleet.core.runner import RunResult
from glm_fleet.node.support import HIDDEN, gather, hider, known_secrets

KEY = "k3y-of-the-nodes"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, text in {
        "etc/glm-fleet/serving.env": f"A=1\nVLLM_API_KEY='{KEY}'\nHF_HUB_OFFLINE=1\n",
        "etc/glm-fleet/attestation.json": '{"port": 8000}',
        "etc/glm-fleet/deployments/0123456789ab/serving.env": f"VLLM_API_KEY={KEY}\n",
        "etc/glm-fleet/deployments/0123456789ab/deployment.json": '{"id": "0123456789ab"}',
        "etc/haproxy/glm-fleet/nodes.map": f"credential {KEY}\n",
        "var/lib/glm-fleet/held.json": "{}",
        "var/lib/glm-fleet/clients.json": '{"anna": "digest"}',
        "var/lib/glm-fleet/incidents/2026/journal.txt": f"Authorization: Bearer {KEY}\n",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def host(argv: Sequence[str], **_: Any) -> RunResult:
    if argv[0] == "nvidia-smi":
        raise FleetError("The program nvidia-smi is missing")
    if argv[0] == "df":
        raise FleetError("The program df did not end", found="60 s")
    return RunResult(0, f"{argv[-1]} with {KEY} and --api-key other-secret\n", "")


def test_no_secret_leaves_a_host(root: Path) -> None:
    found = gather(host, root)
    assert not any(KEY in text or "other-secret" in text for text in found.values())
    assert HIDDEN in found["incidents/var_lib_glm-fleet_incidents_2026_journal.txt"]
    assert not any("serving.env" in name or "clients" in name for name in found)
    assert "settings/etc_glm-fleet_attestation.json" in found
    assert "deployments/etc_glm-fleet_deployments_0123456789ab_deployment.json" in found
    assert "nvidia-smi.txt" not in found
    assert "did not end" in found["disks.txt"]


def test_the_secrets_are_those_that_the_files_name(root: Path) -> None:
    assert known_secrets(root) == {KEY}
    assert known_secrets(root / "nowhere") == set()


@pytest.mark.parametrize(
    "text",
    [
        "MODEL_TOKEN=hunter2hunter2",
        'api_key: "hunter2hunter2"',
        "{'password': 'hunter2hunter2'}",
        "https://user:hunter2hunter2@proxy/",
        "Authorization: Bearer hunter2hunter2",
        "token hf_hunter2hunter2",
        "--api-key hunter2hunter2",
        "-----BEGIN PRIVATE KEY-----\nhunter2hunter2\n-----END PRIVATE KEY-----",
    ],
)
def test_what_looks_like_a_secret_is_taken_out(text: str) -> None:
    assert "hunter2" not in hider(())(f"before {text} after")


def test_what_is_no_secret_stays() -> None:
    text = "max_tokens=16 tokens: 5 tokenizer=glm key=value 1024 tokens in 3 s"
    assert hider(())(text) == text
