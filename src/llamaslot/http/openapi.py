"""The OpenAPI description of llamaslot's own routes, as data. docs/operations.md explains the fields.

llama-server's routes are not included: they are passed through.
"""

from __future__ import annotations

from typing import Any

from llamaslot import __version__
from llamaslot.observe.journal import KEPT

Json = dict[str, Any]


def _object(**properties: Json) -> Json:
    """An object with these required properties; a later version may add more."""
    return {"type": "object", "required": list(properties), "properties": properties}


def _or_null(schema: Json) -> Json:
    return {"anyOf": [schema, {"type": "null"}]}


def _list_of(schema: Json) -> Json:
    return {"type": "array", "items": schema}


def _json(description: str, schema: Json) -> Json:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _get(
    summary: str, answers: dict[str, Json], *parameters: Json, is_open: bool = False, method: str = "get"
) -> Json:
    refused = {} if is_open else {"401": _ERROR, "403": _ERROR}
    security: list[Json] = [{}] if is_open else [{}, {"key": []}]
    return {
        method: {
            "summary": summary,
            "parameters": list(parameters),
            "responses": answers | refused,
            "security": security,
        }
    }


_TEXT: Json = {"type": "string"}
_COUNT: Json = {"type": "integer", "minimum": 0}
_SECONDS: Json = {"type": "number"}
_YES: Json = {"type": "boolean"}

_ERROR = _json(
    "What is wrong, in the shape of OpenAI's errors.",
    _object(error=_object(message=_TEXT, type=_TEXT, code={"type": ["integer", "string"]})),
)
_HEALTH = _object(status=_TEXT)
_STATUS = _object(
    version=_TEXT,
    backends=_list_of(
        _object(
            name=_TEXT,
            health=_TEXT,
            drain=_or_null(_TEXT),
            model=_or_null(_TEXT),
            n_ctx=_or_null(_COUNT),
            cache_kind=_or_null(_TEXT),
            warnings=_list_of(_TEXT),
            assist=_or_null(_object(is_on=_YES, why=_or_null(_TEXT), remedy=_or_null(_TEXT))),
            slots=_list_of(
                _object(
                    id=_COUNT,
                    state=_TEXT,
                    n_tokens=_COUNT,
                    is_dirty=_YES,
                    is_worth_saving=_YES,
                    prefill=_or_null(_object(n_done=_COUNT, n_tokens=_COUNT)),
                    user=_or_null(_TEXT),
                )
            ),
        )
    ),
    snapshots=_object(n=_COUNT, size_bytes=_COUNT, quota_bytes=_COUNT),
    queue=_COUNT,
    users=_list_of(_object(id=_TEXT, running=_COUNT, waiting=_COUNT, deficit_s=_SECONDS)),
    too_long=_object(n=_COUNT, n_tokens=_COUNT),
    rewrite=_list_of(_object(name=_TEXT, n_fired=_COUNT, n_given_up=_COUNT)),
)
_OPTION = _object(
    backend=_TEXT,
    slot={"type": "integer"},
    source=_TEXT,
    n_reused=_COUNT,
    snapshot=_or_null(_TEXT),
    cost_s=_SECONDS,
    terms={"type": "object", "additionalProperties": _SECONDS},
)
_DECISION = _object(
    id=_TEXT,
    at=_SECONDS,
    n_tokens=_COUNT,
    user=_TEXT,
    backend=_or_null(_TEXT),
    slot=_or_null(_COUNT),
    chosen=_or_null(_OPTION),
    next_best=_or_null(_OPTION),
    queued_s=_SECONDS,
    n_expected=_or_null(_COUNT),
    n_reused=_or_null(_COUNT),
    waits=_list_of(
        _object(what=_OPTION, instead=_or_null(_OPTION), expected_s=_SECONDS, seconds=_or_null(_SECONDS))
    ),
    acts=_list_of(_object(step=_TEXT, seconds=_SECONDS, is_done=_YES, n_tokens=_COUNT, size_bytes=_COUNT)),
    rewrote=_list_of(_TEXT),
    diverged=_or_null({"type": "object"}),
    is_assisted=_YES,
    text=_TEXT,
)
_N: Json = {
    "name": "n",
    "in": "query",
    "description": f"How many decisions of the last {KEPT}.",
    "schema": {"type": "integer", "minimum": 0, "default": 100},
}
_BACKEND: Json = {
    "name": "backend",
    "in": "query",
    "required": True,
    "description": "The name of a backend.",
    "schema": {"type": "string", "minLength": 1},
}


def _drain(summary: str) -> Json:
    answers = {
        "200": _json(
            "The state now (null: in service), and the slots that could not be saved.",
            _object(backend=_TEXT, drain=_or_null(_TEXT), unsaved=_list_of(_COUNT)),
        ),
        "400": _ERROR,
        "404": _ERROR,
    }
    return _get(summary, answers, _BACKEND, method="post")


_HEALTH_PAGE = _get(
    "Whether requests are served.",
    {
        "200": _json("Requests are served.", _HEALTH),
        "503": _json("They are not, or not yet.", _HEALTH),
    },
    is_open=True,
)

PATHS: dict[str, Json] = {
    "/health": _HEALTH_PAGE,
    "/v1/health": _HEALTH_PAGE,
    "/llamaslot/status": _get(
        "Slots, snapshots and the queue as they are now.", {"200": _json("Never what they hold.", _STATUS)}
    ),
    "/llamaslot/metrics": _get(
        "Counters for Prometheus.",
        {
            "200": {
                "description": "The text format of Prometheus.",
                "content": {"text/plain": {"schema": _TEXT}},
            }
        },
    ),
    "/llamaslot/journal": _get(
        "The last decisions and their reasons.",
        {"200": _json("The newest first.", _object(decisions=_list_of(_DECISION))), "400": _ERROR},
        _N,
    ),
    "/llamaslot/drain": _drain(
        "Take a backend out of service: answers end, slots are saved, nothing new comes."
    ),
    "/llamaslot/undrain": _drain("Put a drained backend into service again."),
    "/llamaslot/openapi.json": _get(
        "This description.",
        {"200": _json("OpenAPI 3.1.", {"type": "object", "required": ["openapi", "paths"]})},
    ),
}

DESCRIPTION: Json = {
    "openapi": "3.1.0",
    "info": {
        "title": "llamaslot",
        "version": __version__,
        "summary": "llamaslot about itself. All other routes are llama-server's.",
        "license": {"name": "MIT", "identifier": "MIT"},
    },
    "paths": PATHS,
    "components": {
        "securitySchemes": {
            "key": {"type": "http", "scheme": "bearer", "description": "Where auth.admin_key is configured."}
        }
    },
}
