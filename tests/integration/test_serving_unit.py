# SPDX-License-Identifier: Apache-2.0
"""The unit and the environment file of a real node, rendered by Ansible from the defaults."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.rendering import render

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rendered")
    files = ["glm-serving.service", "serving.env"]
    return render(folder, "serving", files, roles=["common", "artifact"])


def test_the_unit_serves_with_the_command_line_of_the_defaults(rendered: Path) -> None:
    unit = (rendered / "glm-serving.service").read_text()
    joined = " ".join(unit.replace("\\\n", " ").split())
    assert (
        "ExecStart=/opt/glm-fleet/current/bin/vllm serve /srv/glm-fleet/model --host 0.0.0.0 "
        "--port 8000 --served-model-name glm-5.2 --tensor-parallel-size 8 "
        "--attention-backend TRITON_MLA_SPARSE --dtype bfloat16 --kv-cache-dtype bfloat16 "
        "--max-model-len 32768 --gpu-memory-utilization 0.9 --max-num-seqs 32 "
        "--tool-call-parser glm47 --reasoning-parser glm45 --shutdown-timeout 600 "
        "--enable-auto-tool-choice "
        '--compilation-config "{\\"cudagraph_mode\\":\\"FULL_AND_PIECEWISE\\"}"'
    ) in joined
    for line in (
        "User=glm",
        "Restart=always",
        "StartLimitBurst=5",
        "KillMode=mixed",
        "TimeoutStopSec=720",
        "EnvironmentFile=/etc/glm-fleet/serving.env",
        "ProtectSystem=strict",
    ):
        assert line in unit.splitlines()
    assert "-m glm_fleet.gate --user glm --limit-mib 1024" in joined
    # A date in it would restart every node on every run.
    assert "20" + "26" not in unit


def test_the_environment_keeps_compile_caches_by_release(rendered: Path) -> None:
    lines = (rendered / "serving.env").read_text().splitlines()
    cache = "/var/cache/glm-fleet/vllm-0.23.0-pr38476-0123456789ab"
    for line in (
        "VLLM_USE_DEEP_GEMM=0",
        "VLLM_USE_FLASHINFER_SAMPLER=0",
        "VLLM_ENGINE_READY_TIMEOUT_S=7200",
        "HF_HUB_OFFLINE=1",
        f"TRITON_CACHE_DIR={cache}/triton",
    ):
        assert line in lines
    assert not any(line.startswith(("VLLM_API_KEY", "HF_TOKEN")) for line in lines)
