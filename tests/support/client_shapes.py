"""Requests as well-known applications send them: their fields, headers and habits, with short texts.

``FIRM`` has the fields that make two answers comparable; no application sends these.
"""

from __future__ import annotations

from typing import Any

from tests.support.http_api import FIRM, JSON, Ask

_SCHEMA = {
    "$schema": "http://json-schema.org/draft-07/schema#",
    "type": "object",
    "properties": {"path": {"type": "string", "description": "The file"}, "limit": {"type": "number"}},
    "required": ["path"],
    "additionalProperties": False,
}
_READ: dict[str, Any] = {"name": "read", "description": "Read a file", "parameters": _SCHEMA}
_CALL = {"id": "call_1", "type": "function", "function": {"name": "read", "arguments": '{"path": "a"}'}}
_ROUND: list[dict[str, Any]] = [
    {"role": "system", "content": "You are a coding agent."},
    {"role": "user", "content": "What is in a?"},
    {"role": "assistant", "content": "", "tool_calls": [_CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": "nothing"},
]
_STAINLESS = {
    "Accept": "application/json",
    "Authorization": "Bearer sk-no-key",
    "User-Agent": "OpenAI/JS 4.104.0",
    "x-stainless-lang": "js",
    "x-stainless-retry-count": "0",
}
_USAGE = {"stream": True, "stream_options": {"include_usage": True}}


def _post(name: str, path: str, body: dict[str, Any], **headers: str) -> Ask:
    sent = {**JSON, **{key.replace("_", "-"): value for key, value in headers.items()}}
    return Ask(name, "POST", path, {**body, **FIRM}, sent)


def _chat(name: str, body: dict[str, Any], **headers: str) -> Ask:
    return _post(name, "/v1/chat/completions", {"model": "local", **body}, **headers)


SHAPES = [
    _chat(
        "Cline",
        {
            "messages": [
                {"role": "system", "content": "You are Cline."},
                {"role": "user", "content": [{"type": "text", "text": "<task>\nhi\n</task>"},
                                             {"type": "text", "text": "<environment_details>"}]},
            ],
            "max_tokens": 6,
            **_USAGE,
        },
        **_STAINLESS,
    ),
    _chat(
        "opencode",
        {"messages": _ROUND, "max_tokens": 6, "tools": [{"type": "function", "function": _READ}],
         "tool_choice": "auto", **_USAGE},
        Authorization="Bearer x", User_Agent="opencode/1.0 ai-sdk/provider-utils/3.0",
    ),
    _chat(
        "opencode's title",
        {"messages": [{"role": "system", "content": "You are a title generator."},
                      {"role": "user", "content": "Generate a title:\n"}, {"role": "user", "content": "hi"}],
         "max_tokens": 6, "reasoning_effort": "low", **_USAGE},
        Authorization="Bearer x",
    ),
    _chat("Continue", {"messages": _ROUND[:2], "max_tokens": 6, "stream": True, "stop": ["\n\n\n"]},
          Authorization="Bearer x", api_key="x"),
    _post("Continue's completion", "/v1/completions",
          {"model": "local", "prompt": "def f(", "suffix": "", "max_tokens": 6, "stop": ["\n\n"], "stream": True}),
    _chat("Open WebUI", {"messages": _ROUND[1:2], "max_tokens": 6, "stream": True},
          Authorization="Bearer x", X_OpenWebUI_User_Name="ada", X_OpenWebUI_Chat_Id="c"),
    _chat("Open WebUI's title", {"messages": _ROUND[1:2], "max_completion_tokens": 6, "stream": False},
          Authorization="Bearer x"),
    _chat("Zed", {"messages": _ROUND[:2], "max_completion_tokens": 6, "stop": [], "parallel_tool_calls": False,
                  "tools": [], **_USAGE}, Accept="text/event-stream"),
    _chat("LangChain", {"messages": _ROUND[1:2], "max_completion_tokens": 6, "n": 1, "logprobs": False,
                        "stream": False, "user": "ada", "response_format": {"type": "text"}}, **_STAINLESS),
    _chat("fields of next year", {"messages": _ROUND[1:2], "max_tokens": 6, "store": False, "verbosity": "low",
                                  "service_tier": "auto", "provider": {"order": ["x"]}, "x_unknown": {"a": [1]}}),
    _post(
        "Codex",
        "/v1/responses",
        {
            "model": "local",
            "instructions": "You are Codex.",
            "input": [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]}],
            "tools": [{"type": "function", "strict": False, **_READ}],
            "tool_choice": "auto", "parallel_tool_calls": False, "store": False, "stream": True, "include": [],
            "prompt_cache_key": "0199", "max_output_tokens": 6,
        },
        Accept="text/event-stream", originator="codex_cli_rs", session_id="0199",
    ),
    _post(
        "Claude Code",
        "/v1/messages?beta=true",
        {
            "model": "claude-sonnet-4-5",
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "<system-reminder>\n</system-reminder>"},
                                             {"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}]},
                {"role": "assistant", "content": [{"type": "text", "text": "I look."}, {"type": "tool_use",
                 "id": "toolu_1", "name": "read", "input": {"path": "a"}}]},
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": "nothing"}]},
            ],
            "system": [{"type": "text", "text": "You are Claude Code.", "cache_control": {"type": "ephemeral"}}],
            "tools": [{"name": "read", "description": "Read a file", "input_schema": _SCHEMA}],
            "metadata": {"user_id": "user_0"}, "max_tokens": 6, "stream": True,
            "thinking": {"type": "enabled", "budget_tokens": 1024},
        },
        x_api_key="x", anthropic_version="2023-06-01", anthropic_beta="claude-code-20250219", x_app="cli",
    ),
    _post("Claude Code's count", "/v1/messages/count_tokens?beta=true",
          {"model": "claude", "messages": [{"role": "user", "content": "foo"}], "tools": []}, x_api_key="x"),
    _post(
        "llama.vscode",
        "/infill",
        {"input_prefix": "a = ", "input_suffix": "\n", "prompt": "", "input_extra": [{"filename": "b", "text": "c"}],
         "n_predict": 6, "top_k": 40, "top_p": 0.99, "stream": False, "samplers": ["top_k", "top_p", "infill"],
         "t_max_prompt_ms": 5000, "t_max_predict_ms": 5000},
    ),
    _post("llama.cpp's web UI", "/v1/chat/completions",
          {"messages": _ROUND[1:2], "stream": True, "reasoning_format": "auto", "max_tokens": 6,
           "dynatemp_range": 0, "dynatemp_exponent": 1, "samplers": ["top_k", "temperature"], "timings_per_token": True,
           "return_progress": True, "backend_sampling": False}, X_Conversation_Id="c1"),
    Ask("model list", "GET", "/v1/models", headers={"Authorization": "Bearer x", "Accept": "application/json"}),
    Ask("web UI's settings", "GET", "/props", headers={"Accept": "*/*", "Referer": "http://127.0.0.1/"}),
]  # fmt: skip
