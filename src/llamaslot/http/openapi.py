"""The OpenAPI description of llamaslot's own routes, as data. docs/operations.md explains the fields.

llama-server's routes are not included, because llamaslot passes them through.
"""

from __future__ import annotations

from typing import Any

from llamaslot import __version__
from llamaslot.observe.activity import Activity, Outcome
from llamaslot.observe.history import KEPT as KEPT_REQUESTS
from llamaslot.observe.journal import KEPT
from llamaslot.observe.series import SPANS, Sums

Json = dict[str, Any]


def _object(**properties: Json) -> Json:
    """The schema of an object with these required properties; a later version may add more."""
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
            why_down=_or_null(_TEXT),
            outage=_or_null(_object(began=_SECONDS, ended=_or_null(_SECONDS))),
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


def _param(name: str, description: str, schema: Json, *, required: bool = False) -> Json:
    return {"name": name, "in": "query", "required": required, "description": description, "schema": schema}


_N = _param(
    "n",
    f"Number of decisions to return, of the last {KEPT}.",
    {"type": "integer", "minimum": 0, "default": 100},
)
_BACKEND = _param("backend", "The name of a backend.", {"type": "string", "minLength": 1}, required=True)
_FLIGHT = _object(
    id=_TEXT,
    at=_SECONDS,
    user=_TEXT,
    model=_TEXT,
    client=_TEXT,
    route=_TEXT,
    backend=_or_null(_TEXT),
    slot=_or_null(_COUNT),
    stage=_TEXT,
    position=_or_null(_COUNT),
    n_done=_or_null(_COUNT),
    n_tokens=_or_null(_COUNT),
    n_answered=_or_null(_COUNT),
    tokens_per_s=_or_null(_SECONDS),
    gives_way_to=_TEXT,
)
_OF_ACTIVITY: Json = {
    "id": _TEXT,
    "user": _TEXT,
    "model": _TEXT,
    "client": _TEXT,
    "route": _TEXT,
    "backend": _or_null(_TEXT),
    "slot": _or_null(_COUNT),
    "outcome": {"enum": [outcome.value for outcome in Outcome]},
    "error": _TEXT,
    "source": _TEXT,
    "n_reused": _or_null(_COUNT),
    "first_s": _or_null(_SECONDS),
    "text": _TEXT,
    "stages": _list_of(_object(name=_TEXT, begin_s=_SECONDS, seconds=_SECONDS, note=_TEXT, is_done=_YES)),
    "diverged": _or_null({"type": "object"}),
}
_WHOLE: dict[str, Json] = {
    name: _OF_ACTIVITY.get(
        name, _COUNT if name.startswith("n_") or name in ("status", "serial") else _SECONDS
    )
    for name in Activity.__struct_fields__
}
_ROW = {name: schema for name, schema in _WHOLE.items() if name not in ("stages", "diverged")}


def _sum(name: str, empty: float | None) -> Json:
    """The schema of a field that is a sum; ``empty``: its value where nothing happened."""
    schema = _SECONDS if name.endswith("_s") else _COUNT
    return _or_null(schema) if empty is None else schema


_SUMS = {name: _sum(name, empty) for name, empty in Sums().to_json().items()}
_POINT = _object(at=_COUNT, **_SUMS)
_TODAY = _object(**_SUMS, share_reused=_or_null(_SECONDS))
_SNAPSHOT = _object(
    id=_TEXT,
    store=_TEXT,
    kind=_TEXT,
    n_tokens=_COUNT,
    n_common=_COUNT,
    size_bytes=_COUNT,
    share_bytes=_COUNT,
    created_at=_SECONDS,
    last_used=_SECONDS,
    n_hits=_COUNT,
    value=_SECONDS,
    is_pinned=_YES,
    is_served=_YES,
    model=_TEXT,
    model_name=_or_null(_TEXT),
    request=_TEXT,
    user=_or_null(_TEXT),
    namespace=_TEXT,
)


def _action(summary: str, told: str, parameter: Json, **answer: Json) -> Json:
    answers = {"200": _json(told, _object(**answer)), "400": _ERROR, "404": _ERROR}
    return _get(summary, answers, parameter, method="post")


def _of_snapshot(summary: str) -> Json:
    parameter = _param(
        "snapshot", "The id of the snapshot.", {"type": "string", "minLength": 1}, required=True
    )
    told = "Whether the snapshot is pinned now; null if it is gone."
    return _action(summary, told, parameter, snapshot=_TEXT, is_pinned=_or_null(_YES))


def _drain(summary: str) -> Json:
    told = "The drain state of the backend now (null: in service), and its slots that could not be saved."
    return _action(summary, told, _BACKEND, backend=_TEXT, drain=_or_null(_TEXT), unsaved=_list_of(_COUNT))


_HEALTH_PAGE = _get(
    "Whether requests are served.",
    {
        "200": _json("Requests are served.", _HEALTH),
        "503": _json("Requests are not served, or not yet.", _HEALTH),
    },
    is_open=True,
)

PATHS: dict[str, Json] = {
    "/health": _HEALTH_PAGE,
    "/v1/health": _HEALTH_PAGE,
    "/llamaslot/status": _get(
        "Slots, snapshots and the queue as they are now.",
        {"200": _json("The state; it has no text or tokens of prompts.", _STATUS)},
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
        {"200": _json("The decisions, newest first.", _object(decisions=_list_of(_DECISION))), "400": _ERROR},
        _N,
    ),
    "/llamaslot/drain": _drain(
        "Take a backend out of service: no request begins there, running answers end, then its slots are saved."
    ),
    "/llamaslot/undrain": _drain("Put a drained backend into service again."),
    "/llamaslot/reload": _get(
        "Read the configuration again, and put the changes in force that need no restart.",
        {
            "200": _json(
                "The changed keys: those in force now, and those that need a restart.",
                _object(in_force=_list_of(_TEXT), needs_restart=_list_of(_TEXT)),
            ),
            "409": _ERROR,
        },
        method="post",
    ),
    "/llamaslot/": _get(
        "The page for a browser.",
        {"200": {"description": "HTML.", "content": {"text/html": {"schema": _TEXT}}}},
        is_open=True,
    ),
    "/llamaslot/events": _get(
        "The state of llamaslot, as a stream of its changes.",
        {
            "200": {
                "description": "Server-sent events: 'all' has the whole state by key, 'change' what has changed; a key"
                " that is gone is null. Keys: now, about, headline, store, ended (the"
                " last requests that have ended), backend:NAME, flight:SERIAL.",
                "content": {"text/event-stream": {"schema": _TEXT}},
            },
            "400": _ERROR,
        },
        _param(
            "seconds",
            "Seconds after which the stream ends; 0: never.",
            {"type": "integer", "minimum": 0, "default": 0},
        ),
    ),
    "/llamaslot/activity": _get(
        "Requests in flight, and the last requests that have ended.",
        {
            "200": _json(
                "Requests, newest first. With 'request' all fields of that one, with its timeline.",
                {
                    "anyOf": [
                        _object(in_flight=_list_of(_FLIGHT), ended=_list_of(_object(**_ROW)), today=_TODAY),
                        _object(**_WHOLE),
                    ]
                },
            ),
            "400": _ERROR,
            "404": _ERROR,
        },
        _param(
            "n",
            f"Number of ended requests to return, of the last {KEPT_REQUESTS}.",
            {"type": "integer", "minimum": 0, "default": 100},
        ),
        _param(
            "after",
            "Only ended requests with a greater serial.",
            {"type": "integer", "minimum": 0, "default": 0},
        ),
        _param("request", "The id of a request that has ended.", _TEXT),
    ),
    "/llamaslot/history": _get(
        "Sums over the requests of each period.",
        {
            "200": _json(
                "One list of points for each line; periods without requests are left out.",
                _object(
                    span=_TEXT,
                    by=_TEXT,
                    now=_SECONDS,
                    span_s=_COUNT,
                    step_s=_COUNT,
                    lines=_list_of(_object(name=_TEXT, points=_list_of(_POINT))),
                ),
            ),
            "400": _ERROR,
        },
        _param("span", "The time span, which ends now.", {"enum": list(SPANS), "default": "hour"}),
        _param(
            "by",
            "Whether to return one line for all requests, or one for each backend or model.",
            {"enum": ["all", "backend", "model"], "default": "all"},
        ),
    ),
    "/llamaslot/snapshots": _get(
        "The snapshots on disk.",
        {
            "200": _json(
                "Snapshots with the same beginning follow each other; 'n_common': the tokens that one shares with the"
                " one before.",
                _object(
                    n=_COUNT,
                    most=_COUNT,
                    size_bytes=_COUNT,
                    quota_bytes=_COUNT,
                    snapshots=_list_of(_SNAPSHOT),
                ),
            ),
            "400": _ERROR,
        },
        _param(
            "max_age_s",
            "The reported times of use may be this many seconds old.",
            {"type": "integer", "minimum": 0, "default": 0},
        ),
    ),
    "/llamaslot/cancel": _action(
        "Cancel a request in flight: its client gets an error, and its slot is given back.",
        "The request ends at its next step.",
        _param("request", "The id of the request.", {"type": "string", "minLength": 1}, required=True),
        request=_TEXT,
    ),
    "/llamaslot/pin": _of_snapshot("Keep a snapshot: it is not evicted while its model is served."),
    "/llamaslot/unpin": _of_snapshot("Let a pinned snapshot be evicted again."),
    "/llamaslot/delete": _of_snapshot("Remove a snapshot: at once, or when no request uses it any more."),
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
            "key": {
                "type": "http",
                "scheme": "bearer",
                "description": "Needed if auth.admin_key or a key with --admin is configured.",
            }
        }
    },
}
