"""Compares llamaslot's own routes with the OpenAPI description that llamaslot gives of them, by schemathesis."""

from __future__ import annotations

import contextlib
from typing import Any

import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode


def examine(url: str, description: Any, n_examples: int, headers: dict[str, str] | None = None) -> int:
    """Send each operation ``n_examples`` times as it is described, and as often in other ways. Returns the number of
    requests.

    Raises schemathesis' failures: a status, a content type or a body that the description does not have, and 500.
    Blocks: call it in a thread.
    """
    schema = schemathesis.openapi.from_dict(description)
    schema.config.update(base_url=url)
    n_asked = 0
    with requests.Session() as session:
        for found in schema.get_all_operations():
            operation = found.ok()
            if operation.path == "/llamaslot/events":  # never ends
                continue
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
                strategy = operation.as_strategy(generation_mode=mode)

                @settings(
                    max_examples=n_examples,
                    deadline=None,
                    database=None,
                    derandomize=True,
                    suppress_health_check=list(HealthCheck),
                )
                @given(case=strategy)
                def ask(case: schemathesis.Case) -> None:
                    nonlocal n_asked
                    n_asked += 1
                    case.call_and_validate(headers=headers, session=session)

                # Nothing can be wrong with a request that takes no parameters.
                with contextlib.suppress(*([Unsatisfiable] if mode is GenerationMode.NEGATIVE else [])):
                    ask()
    return n_asked
