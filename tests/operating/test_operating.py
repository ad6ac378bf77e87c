"""The dashboard and the alerts: as committed, about metrics that are there, and seen to work."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, start_http_server

from operating.__main__ import DASHBOARD, RULES, dashboard, rules
from operating.rules import ALERTS, PANELS, P
from prefetch_embeddings import PrefetchingRetriever
from prefetch_embeddings.instrumentation import prometheus
from prefetch_embeddings.instrumentation._figures import FIGURES
from prefetch_embeddings.testing import ScriptedRetriever
from tests.helpers import PATIENCE

KNOWN = {f"{P}{figure.name}_total" for figures in FIGURES.values() for figure in figures}
KNOWN |= {f"{P}query_duration_seconds_{end}" for end in ("bucket", "count", "sum")}


def program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"no {name} here: apt-get install prometheus")
    return found


def test_the_files_are_what_the_definitions_say() -> None:
    assert DASHBOARD.read_text("utf-8") == dashboard(), "python -m operating"
    assert RULES.read_text("utf-8") == rules(), "python -m operating"


@pytest.mark.parametrize("query", [each.query for each in (*PANELS, *ALERTS)])
def test_queries_are_about_metrics_that_are_there(query: str) -> None:
    named = set(re.findall(rf"{P}\w+", query))
    assert named
    assert named <= KNOWN


def test_prometheus_takes_the_rules() -> None:
    done = subprocess.run(
        [program("promtool"), "check", "rules", str(RULES)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("alert", ALERTS, ids=[alert.name for alert in ALERTS])
@pytest.mark.parametrize("staged", [True, False], ids=["staged", "calm"])
def test_each_alert_fires_in_its_fault_and_not_without(
    alert: Any, staged: bool, tmp_path: Path
) -> None:
    labels = {"name": "bot", "kind": "retrieval"}
    written = ",".join(f'{key}="{value}"' for key, value in labels.items())
    calm = {"query_ready": 60, "prefetch_started": 60, "prefetch_succeeded": 60, "redis_hits": 60}
    zeros = dict.fromkeys(alert.staged, 0.0)
    grows = alert.staged if staged else {**zeros, **calm}
    series = [
        {"series": f"{P}{counter}_total{{{written}}}", "values": f"0+{by}x90"}
        for counter, by in {**dict.fromkeys(_counters(alert.query), 0.0), **grows}.items()
    ]
    text = next(each for each in json.loads(rules().partition("\n")[2])["groups"][0]["rules"]
                if each["alert"] == alert.name)  # fmt: skip
    summary = text["annotations"]["summary"]
    for key, value in labels.items():
        summary = summary.replace(f"{{{{ $labels.{key} }}}}", value)
    fired = {
        "exp_labels": {**labels, "severity": "warning"},
        "exp_annotations": {"summary": summary, "description": alert.do},
    }
    check = {
        "eval_time": "60m",
        "alertname": alert.name,
        "exp_alerts": [fired] if staged else [],
    }
    tests = {
        "rule_files": [str(RULES)],
        "evaluation_interval": "1m",
        "tests": [{"interval": "1m", "input_series": series, "alert_rule_test": [check]}],
    }
    file = tmp_path / "tests.yml"
    file.write_text(json.dumps(tests), "utf-8")
    done = subprocess.run(
        [program("promtool"), "test", "rules", str(file)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def _counters(query: str) -> set[str]:
    return {name.removesuffix("_total") for name in re.findall(rf"{P}(\w+_total)", query)}


def test_every_panel_of_the_dashboard_shows_something(tmp_path: Path) -> None:
    registry = CollectorRegistry()
    server, thread = start_http_server(0, addr="127.0.0.1", registry=registry)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = tmp_path / "prometheus.yml"
    scrape = {
        "job_name": "bot",
        "scrape_interval": "1s",
        "static_configs": [{"targets": [f"127.0.0.1:{server.server_port}"]}],
    }
    config.write_text(json.dumps({"scrape_configs": [scrape], "rule_files": [str(RULES)]}))
    running = subprocess.Popen(
        [
            program("prometheus"),
            f"--config.file={config}",
            f"--storage.tsdb.path={tmp_path / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        with PrefetchingRetriever(ScriptedRetriever(delays=lambda _: 0.01)) as retriever:
            prometheus.instrument(retriever, name="bot", registry=registry)
            shown: set[str] = set()
            give_up_at, number = time.monotonic() + 2 * PATIENCE, 0
            while len(shown) < len(PANELS) and time.monotonic() < give_up_at:
                for _ in range(20):
                    number += 1
                    retriever.prefetch(f"q {number}")
                    retriever.invoke(f"q {number}")
                time.sleep(0.2)
                shown |= {panel.title for panel in PANELS if _answer(port, panel.query)}
            assert shown == {panel.title for panel in PANELS}
    finally:
        running.terminate()
        running.wait(PATIENCE)
        server.shutdown()
        server.server_close()
        thread.join()


def _answer(port: int, query: str) -> list[Any]:
    url = f"http://127.0.0.1:{port}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            found: list[Any] = json.loads(answer.read())["data"]["result"]
    except OSError:  # it has not started yet
        return []
    return [each for each in found if each["value"][1] != "NaN"]
