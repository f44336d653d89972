"""What is served without its tokens is counted, and said once for each reason."""

from __future__ import annotations

import pytest

from llamaslot.errors import Reason
from llamaslot.observe.metrics import Metrics, UntokenizedRequests


def test_each_is_counted_and_each_reason_said_once(caplog: pytest.LogCaptureFixture) -> None:
    """With what it costs, and what to do."""
    metrics = Metrics()
    untokenized = UntokenizedRequests(metrics)
    for kind in ("chat", "messages", "chat"):
        for reason in Reason:
            untokenized.count(kind, reason)
    text = metrics.exposition().decode()
    for reason in Reason:
        assert f'llamaslot_completions_untokenized_total{{kind="chat",reason="{reason.value}"}} 2.0' in text
    assert len(caplog.messages) == len(Reason)
    assert all("its context is not found again" in line for line in caplog.messages)
