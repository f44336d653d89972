"""Traces: W3C headers reach llama-server, and a span of OpenTelemetry's tells what a completion did."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from llamaslot.config.load import Config
from llamaslot.errors import ConfigError
from llamaslot.http import tracing
from tests.support.inprocess import NATIVE, letters, served

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
HEADERS = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=1"}
ON = {"log": {"otlp_endpoint": "http://127.0.0.1:9/v1/traces"}}


async def test_the_clients_trace_reaches_llama_server(tmp_path: Path) -> None:
    """As it is, where llamaslot makes no spans of its own."""
    async with served(tmp_path) as it:
        body = {"prompt": letters(1, 300), "n_predict": 2}
        async with it.session.post(it.url + NATIVE, json=body, headers=HEADERS) as response:
            assert response.status == 200
            await response.read()
        seen = it.fake.sent(NATIVE)[-1]
        assert {name: seen.headers[name] for name in HEADERS} == HEADERS


@pytest.mark.parametrize("name", ["traceparent", "Traceparent"])
async def test_a_completion_is_a_span(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """In the client's trace, however it writes the header, with what the journal has; llama-server continues it. Status
    pages are none.
    """
    spans = InMemorySpanExporter()
    monkeypatch.setattr(tracing, "_exporter", lambda endpoint: spans)
    async with served(tmp_path, ON) as it:
        body = {"prompt": letters(1, 300), "n_predict": 2}
        async with it.session.post(
            it.url + NATIVE, json=body, headers={name: HEADERS["traceparent"]}
        ) as response:
            await response.read()
        await it.get("/llamaslot/status")
        seen = it.fake.sent(NATIVE)[-1]
    [span] = spans.get_finished_spans()
    assert span.context is not None
    assert span.parent is not None
    assert span.attributes is not None
    assert f"{span.context.trace_id:032x}" == TRACE
    assert f"{span.parent.span_id:016x}" == PARENT
    assert seen.headers["traceparent"] == f"00-{TRACE}-{span.context.span_id:016x}-01"
    assert span.name == f"POST {NATIVE}"
    assert span.attributes["llamaslot.prompt_tokens"] == 300
    assert span.attributes["llamaslot.source"] == "cold"
    assert span.attributes["llamaslot.backend"] == "gpu0"
    assert span.attributes["http.response.status_code"] == 200


@pytest.mark.parametrize("found", [None, ModuleNotFoundError("opentelemetry")])
def test_without_the_extra_it_is_a_fault_of_the_configuration(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, found: Exception | None
) -> None:
    """So serve --check finds it."""

    def find_spec(name: str) -> None:
        if found is not None:
            raise found

    path = tmp_path / "config.yaml"
    path.write_text(f"backends: [{{url: 'http://127.0.0.1:9'}}]\nlog: {ON['log']}\n")
    Config.load(path)
    monkeypatch.setattr("importlib.util.find_spec", find_spec)
    with pytest.raises(ConfigError, match=r"log\.otlp_endpoint.*pipx inject llamaslot opentelemetry"):
        Config.load(path)


def test_nothing_of_it_is_imported_unless_it_is_wanted() -> None:
    """Nor what makes plots and sites: a start would take twice as long."""
    code = (
        "import sys, llamaslot.http.serve, llamaslot.http.app\n"
        "sys.exit(', '.join({'opentelemetry', 'plotly', 'mkdocs', 'requests'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (1, "\n"), ran.stderr
