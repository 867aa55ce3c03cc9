# SPDX-License-Identifier: Apache-2.0
"""What is given to Prometheus and Grafana, checked by promtool."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import yaml
from glm_fleet.health.exposition import exposition, targets
from glm_fleet.health.tables import health_json
from test_judge import FAULTS, fleet_records, judge

ROOT = Path(__file__).resolve().parents[2]
MONITORING = ROOT / "monitoring"
DASHBOARD = json.loads((MONITORING / "grafana.json").read_text())


def promtool(*arguments: str, folder: Path, text: str = "") -> str:
    """Run promtool and return what it says; it comes with ./bootstrap test."""
    done = subprocess.run(
        ["promtool", *arguments],
        cwd=folder,
        input=text,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def report_text() -> str:
    records = fleet_records()
    FAULTS["hung"][0](records["gpu02"]["node"])
    records["gpu03"] = {"message": "timed out", "groups": ["gpu_nodes"]}
    records["gpu01"]["node"]["attestation"]["model_id"] = 'a "quoted"\\model\n'
    nodes, gateways = judge(records)
    return exposition(health_json(nodes, gateways, "2026-11-22T12:00:00+00:00"))


def test_the_text_says_what_the_report_says(tmp_path: Path) -> None:
    text = report_text()
    assert 'glm_fleet_host_verdict{host="gpu02",role="node",verdict="broken"} 1' in text
    assert 'glm_fleet_host_verdict{host="gpu02",role="node",verdict="healthy"} 0' in text
    assert 'glm_fleet_host_verdict{host="gpu03",role="node",verdict="unknown"} 1' in text
    assert 'glm_fleet_host_verdict{host="gw01",role="gateway",verdict="healthy"} 1' in text
    assert 'glm_fleet_finding{host="gpu02",check="engine",verdict="broken"} 1' in text
    assert 'glm_fleet_canary_tokens_per_second{host="gpu01"} 56.04' in text
    assert 'model="a \\"quoted\\"\\\\model\\n"' in text
    assert "glm_fleet_health_time_seconds 1.79535e+09" not in text, "a time needs all its digits"
    promtool("check", "metrics", folder=tmp_path, text=text)


def test_the_alerts_fire_when_they_should_and_not_before(tmp_path: Path) -> None:
    shutil.copy(MONITORING / "alerts.yml", tmp_path)
    shutil.copy(ROOT / "tests/unit/fixtures/alerts.test.yml", tmp_path)
    promtool("check", "rules", "alerts.yml", folder=tmp_path)
    assert "SUCCESS" in promtool("test", "rules", "alerts.test.yml", folder=tmp_path)


def test_the_scrape_configuration_finds_the_fleet(tmp_path: Path) -> None:
    hostvars = {
        "gpu01": {"ansible_host": "192.0.2.11"},
        "gpu02": {"ansible_host": "192.0.2.12", "serving_port": 9000},
        "gw01": {"ansible_host": "192.0.2.101", "gateway_metrics_bind": "0.0.0.0:8406"},
        "gw02": {"ansible_host": "192.0.2.102", "gateway_metrics_bind": ""},
    }
    found = targets(hostvars, ["gpu01", "gpu02"], ["gw01", "gw02"])
    assert [each["targets"] for each in found] == [
        ["192.0.2.11:8000"],
        ["192.0.2.12:9000"],
        ["192.0.2.101:8406"],
    ]
    assert found[0]["labels"] == {"role": "node", "host": "gpu01"}
    for name in ("prometheus.yml", "alerts.yml"):
        shutil.copy(MONITORING / name, tmp_path)
    (tmp_path / "targets.json").write_text(json.dumps(found))
    promtool("check", "config", "prometheus.yml", folder=tmp_path)


def test_every_panel_asks_what_prometheus_understands(tmp_path: Path) -> None:
    queries = [
        target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", ())
    ]
    assert len(queries) >= 15
    rules = [
        {"record": f"panel:{number}", "expr": query.replace("$__rate_interval", "5m")}
        for number, query in enumerate(queries)
    ]
    (tmp_path / "rules.yml").write_text(
        yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]})
    )
    promtool("check", "rules", "rules.yml", folder=tmp_path)


def test_nobody_asks_for_a_metric_that_we_do_not_write() -> None:
    written = set(re.findall(r"^# TYPE (\S+)", report_text(), re.MULTILINE))
    asked = set(
        re.findall(
            r"\bglm_fleet_\w+",
            (MONITORING / "alerts.yml").read_text() + json.dumps(DASHBOARD["panels"]),
        )
    )
    assert asked <= written
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
