"""The prompt that the fake makes of an /infill body, as the real server does for ``models.dense(…, fim=True)``."""

from __future__ import annotations

from typing import Any

from tests.support.fake_model import BadInput, FakeModel
from tests.support.fake_types import Shape

PREFIX, SUFFIX, MIDDLE = 1, 2, 3
UNSUPPORTED = "Infill is not supported by this model: prefix token is missing. suffix token is missing."


def tokens(body: Any, model: FakeModel, shape: Shape) -> list[int]:
    """Return the tokens of the prompt. Raises BadInput with the words of the real server."""
    if not model.has_infill:
        raise BadInput(UNSUPPORTED, 501, "not_supported_error")
    for name in ("input_suffix", "input_prefix"):
        if name not in body:
            raise BadInput(f"[json.exception.out_of_range.403] key '{name}' not found")
    extra: list[int] = []
    for chunk in body.get("input_extra") or ():
        if not isinstance(chunk, dict) or not isinstance(chunk.get("text"), str):
            raise BadInput('extra_context chunk must contain a "text" field with a string value', 400)
        extra += model.tokenize("\n\n--- snippet ---\n\n" + chunk["text"], parse_special=False)
    given = body.get("prompt")
    begun = model.tokenize(given) if isinstance(given, str) else []
    quarter = shape.batch // 4
    prefix = _mixed(body["input_prefix"], model)
    suffix = _mixed(body["input_suffix"], model)[: max(0, quarter - 2 - len(begun))]
    extra = extra[max(0, len(extra) - max(0, shape.n_ctx - shape.batch + 2)) :]
    prefix = prefix[max(0, len(prefix) - 3 * quarter) :]
    return [*extra, PREFIX, *prefix, *begun, SUFFIX, *suffix, MIDDLE]


def _mixed(given: Any, model: FakeModel) -> list[int]:
    ids: list[int] = []
    for part in given if isinstance(given, list) else [given]:
        if isinstance(part, str):
            ids += model.tokenize(part, parse_special=False)
        elif isinstance(given, list) and isinstance(part, int):
            ids.append(part)
        else:
            raise BadInput("[json.exception.type_error.302] type must be string, but is number")
    return ids
