"""What ``body["prompt"]`` of a completion may be (tools/server/server-common.cpp: tokenize_input_prompts)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def listed(prompt: Any) -> list[Any]:
    """The prompts that ``body["prompt"]`` is: a list with an id in it is one."""
    return prompt if isinstance(prompt, list) and int not in set(map(type, prompt)) else [prompt]


def n_texts(prompt: Any) -> int:
    """Those to be tokenized for one prompt, or for a list of them."""
    if isinstance(prompt, Mapping):
        prompt = prompt.get("prompt_string")
    if isinstance(prompt, list) and not set(map(type, prompt)) <= {int}:
        return sum(n_texts(part) for part in prompt if not isinstance(part, int))
    return 1 if isinstance(prompt, str) else 0
