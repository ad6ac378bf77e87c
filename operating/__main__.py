"""Writes the dashboard and the alert rules: ``python -m operating``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from operating.rules import ALERTS, PANELS

FOLDER = Path(__file__).parent
DASHBOARD = FOLDER / "grafana-dashboard.json"
RULES = FOLDER / "prometheus-alerts.yml"


def dashboard() -> str:
    """Return the dashboard, for Grafana's import."""
    panels: list[dict[str, Any]] = [
        {
            "id": number,
            "title": panel.title,
            "description": panel.means,
            "type": "timeseries",
            "datasource": {"type": "prometheus", "uid": "${datasource}"},
            "gridPos": {"x": 12 * (number % 2), "y": 8 * (number // 2), "w": 12, "h": 8},
            "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
            "targets": [{"refId": "A", "expr": panel.query, "legendFormat": "__auto"}],
        }
        for number, panel in enumerate(PANELS)
    ]
    whole = {
        "title": "prefetch-embeddings",
        "uid": "prefetch-embeddings",
        "schemaVersion": 39,
        "time": {"from": "now-6h", "to": "now"},
        "templating": {
            "list": [{"name": "datasource", "type": "datasource", "query": "prometheus"}]
        },
        "panels": panels,
    }
    return json.dumps(whole, indent=2) + "\n"


def rules() -> str:
    """Return the alert rules, for Prometheus' `rule_files`. JSON is YAML."""
    alerts = [
        {
            "alert": alert.name,
            "expr": alert.query,
            "for": alert.after,
            "labels": {"severity": "warning"},
            "annotations": {
                "summary": f"{alert.summary} ({{{{ $labels.name }}}}, {{{{ $labels.kind }}}})",
                "description": alert.do,
            },
        }
        for alert in ALERTS
    ]
    groups = {"groups": [{"name": "prefetch-embeddings", "rules": alerts}]}
    return "# Written by python -m operating.\n" + json.dumps(groups, indent=2) + "\n"


if __name__ == "__main__":
    DASHBOARD.write_text(dashboard(), "utf-8")
    RULES.write_text(rules(), "utf-8")
