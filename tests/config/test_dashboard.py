"""The dashboard, the alerts and the documentation name the metrics that there are: all of them."""

import importlib
import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from sample_names import sample_names

from triattention_vllm.metrics import METRICS, metrics_table

ROOT = Path(__file__).parents[2]
DASHBOARD = json.loads((ROOT / "configs/grafana/kv-compression.json").read_text())
ALERTS = yaml.safe_load((ROOT / "configs/grafana/kv-compression-alerts.yaml").read_text())
OURS = {name for metric in METRICS for name in sample_names(metric)}


def names(expression: str) -> set[str]:
    """Metric names in a PromQL expression: those with a prefix."""
    return set(re.findall(r"\b[a-z]+:[a-z_]+", expression))


def panel_names() -> set[str]:
    expressions = [t["expr"] for panel in DASHBOARD["panels"] for t in panel["targets"]]
    return {name for expression in expressions for name in names(expression)}


def variable_names() -> set[str]:
    queries = [v["query"]["query"] for v in DASHBOARD["templating"]["list"][1:]]
    return {name for query in queries for name in names(query)}


def rules() -> list[dict[str, Any]]:
    return [rule for group in ALERTS["groups"] for rule in group["rules"]]


def alert_names() -> set[str]:
    return {name for rule in rules() for name in names(rule["expr"])}


def names_of_vllm() -> set[str]:
    """Every name of vLLM's own metrics, with the suffix that a counter gets on the wire."""
    pytest.importorskip("vllm", reason="the names are those of an installed vLLM")
    source = inspect.getsource(importlib.import_module("vllm.v1.metrics.loggers"))
    found = re.findall(r'_(gauge|counter|histogram)_cls\(\s*name="(vllm:\w+)"', source)
    return {f"{name}_total" if kind == "counter" else name for kind, name in found}


def test_every_metric_of_ours_has_a_panel() -> None:
    missing = [m.name for m in METRICS if not set(sample_names(m)) & panel_names()]
    assert missing == []


def test_every_name_in_dashboard_and_alerts_exists() -> None:
    used = panel_names() | variable_names() | alert_names()
    assert len({name for name in used if name.startswith("vllm:")}) >= 4
    assert used - OURS - names_of_vllm() == set()


def test_panels_do_not_overlap_and_have_their_own_id() -> None:
    panels = DASHBOARD["panels"]
    cells = [
        (x, y)
        for panel in panels
        for grid in [panel["gridPos"]]
        for x in range(grid["x"], grid["x"] + grid["w"])
        for y in range(grid["y"], grid["y"] + grid["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_every_variable_of_an_expression_is_defined() -> None:
    defined = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    text = json.dumps(DASHBOARD["panels"])
    used = {name for name in re.findall(r"\$\{?(\w+)", text) if not name.startswith("__")}
    assert used == defined


def test_every_alert_says_when_how_bad_and_what_to_do() -> None:
    assert len(rules()) == len({rule["alert"] for rule in rules()}) >= 4
    for rule in rules():
        assert rule["for"]
        assert rule["labels"]["severity"] in ("info", "warning")
        assert set(rule["annotations"]) == {"summary", "description"}


def test_the_table_of_metrics_is_the_one_in_the_code() -> None:
    assert metrics_table() in (ROOT / "docs" / "metrics.md").read_text()
