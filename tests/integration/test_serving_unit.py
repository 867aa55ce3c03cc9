# SPDX-License-Identifier: Apache-2.0
"""The unit and the environment file of a real node, rendered by Ansible from the defaults."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

PLAYBOOK = """
- hosts: gpu01
  connection: local
  gather_facts: false
  vars_files:
    - {root}/roles/common/defaults/main.yml
    - {root}/roles/artifact/defaults/main.yml
    - {root}/roles/serving/defaults/main.yml
    - {root}/roles/serving/vars/main.yml
  tasks:
    - ansible.builtin.template:
        src: "{root}/roles/serving/templates/{{{{ item }}}}.j2"
        dest: "{dest}/{{{{ item }}}}"
        mode: "0644"
      loop: [glm-serving.service, serving.env]
      vars:
        __serving_made_release: {{id: vllm-0.23.0-pr38476-0123456789ab}}
"""


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rendered")
    (folder / "play.yml").write_text(PLAYBOOK.format(root=ROOT, dest=folder))
    command = [
        str(Path(sys.executable).with_name("ansible-playbook")),
        "-i",
        str(ROOT / "inventory/example"),
        "-e",
        f"ansible_python_interpreter={sys.executable}",
        str(folder / "play.yml"),
    ]
    environment = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "HF_TOKEN": ""}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


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
