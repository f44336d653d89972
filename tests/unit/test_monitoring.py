"""The dashboard and the rules that come with llamaslot ask for metrics that it has."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from prometheus_client.parser import text_string_to_metric_families

from llamaslot import cli
from llamaslot.observe.metrics import Metrics


def printed(what: str) -> str:
    result = CliRunner().invoke(cli.main, ["monitoring", what])
    assert result.exit_code == 0
    return result.output


def expressions() -> Iterator[str]:
    dashboard = json.loads(printed("dashboard"))
    for panel in dashboard["panels"]:
        yield from (target["expr"] for target in panel.get("targets", ()))
    yield from (its["definition"] for its in dashboard["templating"]["list"] if "definition" in its)
    yield from (rule["expr"] for group in rules()["groups"] for rule in group["rules"])


def rules() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(printed("alerts"))
    return found


def samples() -> dict[str, set[str]]:
    """The names of all samples that can be exposed, and their labels."""
    metrics = Metrics()
    backend = metrics.of_backend("gpu0")
    backend.serves("m")
    for value in (backend.placed, backend.tokens_reused, backend.seconds_saved, backend.tokens_expected):
        value.labels("resident")
    backend.steps_failed.labels("save")
    backend.cache_misses.labels("system")
    metrics.requests.labels("own", "200")
    metrics.untokenized.labels("chat", "shape")
    metrics.rewrites.labels("rule")
    families = text_string_to_metric_families(metrics.exposition().decode())
    return {sample.name: set(sample.labels) for family in families for sample in family.samples}


def test_every_expression_asks_for_metrics_that_are_there() -> None:
    """With labels that they have."""
    known = samples()
    asked = set[str]()
    for expression in expressions():
        for name, selector in re.findall(r"\b(llamaslot_\w+)(?:\{([^}]*)\})?", expression):
            assert name in known, expression
            labels = re.findall(r"(\w+)\s*[=!]", selector)
            assert set(labels) <= known[name], expression
            asked.add(name)
        for grouped in re.findall(r"by \(([^)]*)\)", expression):
            names = re.findall(r"\bllamaslot_\w+", expression)
            assert set(re.split(r",\s*", grouped)) <= known[names[0]] | known[names[-1]], expression
    assert len(asked) > 20


def test_the_dashboard_is_in_order() -> None:
    """Each panel has an id, a place of its own and an explanation."""
    panels = json.loads(printed("dashboard"))["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken = set[tuple[int, int]]()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells
        assert panel["type"] == "row" or panel["description"].endswith(".")


def test_the_dashboard_uses_variables_that_it_has() -> None:
    """Or Grafana's own; each target has an id of its own, and asks the data source that is chosen above."""
    dashboard = json.loads(printed("dashboard"))
    its = {variable["name"] for variable in dashboard["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(dashboard)))
    assert used - {"__rate_interval", "__all"} == its
    for panel in dashboard["panels"]:
        targets = panel.get("targets", ())
        assert len({target["refId"] for target in targets}) == len(targets)
        assert all(target["datasource"]["uid"] == "${datasource}" for target in targets), panel["title"]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="apt install prometheus")
def test_prometheus_takes_the_rules(tmp_path: Path) -> None:
    """The lines for reading metrics, and all that the dashboard asks, with values in the place of its variables."""
    (tmp_path / "rules.yaml").write_text(printed("alerts"))
    (tmp_path / "prometheus.yml").write_text(printed("scrape"))
    asked = [
        {"record": f"asked_{i}", "expr": expression.replace("$__rate_interval", "5m").replace("$", "")}
        for i, expression in enumerate(expressions())
        if not expression.startswith("label_values(")  # Grafana's own
    ]
    (tmp_path / "asked.yaml").write_text(yaml.safe_dump({"groups": [{"name": "asked", "rules": asked}]}))
    for what, name in (("rules", "rules.yaml"), ("rules", "asked.yaml"), ("config", "prometheus.yml")):
        done = subprocess.run(
            ["promtool", "check", what, tmp_path / name], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr + done.stdout


def test_a_backend_counts_by_its_model() -> None:
    """Nothing is left of the time before its model was known, and an earlier model keeps its counts."""
    metrics = Metrics()
    backend = metrics.of_backend("gpu0")
    backend.serves("a")
    backend.reused("resident", 90, 100, 1.5)
    backend.serves("b")
    backend.reused("cold", 0, 10)
    text = metrics.exposition().decode()
    assert 'llamaslot_prompt_tokens_total{backend="gpu0",model="a"} 100.0' in text
    assert 'llamaslot_prefill_seconds_saved_total{backend="gpu0",model="a",source="resident"} 1.5' in text
    assert 'llamaslot_prompt_tokens_total{backend="gpu0",model="b"} 10.0' in text
    assert 'model=""' not in text
