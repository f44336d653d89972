"""The form of llama-server's answers: native, OpenAI text, OpenAI chat, Anthropic messages, OpenAI responses."""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from tests.support.fake_model import FakeModel, per_second
from tests.support.fake_stop import text_of
from tests.support.fake_types import Done, Failed, Progress, Result, Task, Times, Token

Json = dict[str, Any]
FINISH = {"limit": "length", "eos": "stop", "word": "stop", "none": "stop"}


def random_name(length: int = 32) -> str:
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(length))


def event(data: Any, name: str | None = None) -> bytes:
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return (f"event: {name}\n" if name else "").encode() + f"data: {text}\n\n".encode()


def timings(task: Task, times: Times, cache: int) -> Json:
    n_prompt = max(0, task.n_cache + times.n_computed - cache)
    prompt_ms = times.prompt_s * 1000
    n_predicted = times.n_predicted
    predicted_ms = max(0.001, times.predicted_s * 1000) if n_predicted else 0.0
    n_gaps = max(1, n_predicted - 1)
    return {
        "cache_n": cache,
        "prompt_n": n_prompt,
        "prompt_ms": prompt_ms,
        "prompt_per_token_ms": prompt_ms / n_prompt if n_prompt else 0.0,
        "prompt_per_second": per_second(n_prompt, prompt_ms),
        "predicted_n": n_predicted,
        "predicted_ms": predicted_ms,
        "predicted_per_token_ms": predicted_ms / n_gaps if n_predicted > 1 else 0.0,
        "predicted_per_second": per_second(n_gaps, predicted_ms) if n_predicted > 1 else 0.0,
    }


@dataclass
class Wording:
    """One answer while it is made. ``lie`` turns the real number of reused tokens into the reported one."""

    model: FakeModel
    tasks: dict[int, Task]
    body: Json
    lie: Any
    now: int
    id: str = field(default_factory=lambda: "chatcmpl-" + random_name())
    n_begun: set[int] = field(default_factory=set)

    ending = b""

    def stream(self, result: Result) -> bytes:
        """The bytes of one write of a stream."""
        task = self.tasks[result.index]
        match result:
            case Progress():
                return self.progress(task, result)
            case Token():
                return self.token(task, result)
            case Done():
                return self.done(task, result)
            case Failed():
                return self.failed(result.error.body())
            case _:
                return b""

    def progress(self, task: Task, result: Progress) -> bytes:
        raise NotImplementedError

    def token(self, task: Task, result: Token) -> bytes:
        raise NotImplementedError

    def done(self, task: Task, result: Done) -> bytes:
        raise NotImplementedError

    def failed(self, body: Json) -> bytes:
        return event(body)

    def whole(self, ends: dict[int, Done]) -> Any:
        raise NotImplementedError

    # ---- parts

    def timings(self, task: Task, times: Times) -> Json:
        return timings(task, times, self.lie(task.n_cache, task.n_prompt))

    def maybe_timings(self, task: Task, times: Times) -> Json:
        return {"timings": self.timings(task, times)} if self.body.get("timings_per_token") else {}

    def prompt_progress(self, result: Progress) -> Json:
        numbers = {"total": result.total, "cache": result.cache, "processed": result.processed}
        return {"prompt_progress": {**numbers, "time_ms": int(result.times.prompt_s * 1000)}}

    def usage(self, task: Task) -> Json:
        n_prompt, n_answer = task.n_prompt, len(task.generated)
        return {
            "completion_tokens": n_answer,
            "prompt_tokens": n_prompt,
            "total_tokens": n_prompt + n_answer,
            "prompt_tokens_details": {"cached_tokens": self.lie(task.n_cache, n_prompt)},
        }

    def text(self, task: Task) -> str:
        text = text_of(task.generated, self.model)
        return text.partition(task.stopping_word)[0] if task.stopping_word else text


class Native(Wording):
    """/completion"""

    def base(self, task: Task, times: Times, **more: Any) -> Json:
        return {
            "index": task.index,
            "content": "",
            "tokens": [0],
            "stop": False,
            "id_slot": -1,
            "tokens_predicted": 0,
            "tokens_evaluated": task.n_prompt,
            **more,
            **self.maybe_timings(task, times),
        }

    def progress(self, task: Task, result: Progress) -> bytes:
        return event(self.base(task, result.times) | self.prompt_progress(result))

    def token(self, task: Task, result: Token) -> bytes:
        more = {
            "content": result.text,
            "tokens": [result.id],
            "tokens_predicted": result.times.n_predicted,
        }
        body = self.base(task, result.times, **more)
        return event(body | self.probabilities([result.top]))

    def done(self, task: Task, result: Done) -> bytes:
        return event(self.final(task, result) | {"content": "", "tokens": []})

    def probabilities(self, tops: Iterable[tuple[Json, ...]]) -> Json:
        chosen = [{**top[0], "top_logprobs": list(top)} for top in tops if top]
        return {"completion_probabilities": chosen} if chosen else {}

    def final(self, task: Task, result: Done) -> Json:
        return {
            "index": task.index,
            "content": self.text(task),
            "tokens": task.generated if self.body.get("return_tokens") else [],
            "id_slot": -1 if task.landed is None else task.landed,
            "stop": True,
            "model": self.model.path,
            "tokens_predicted": len(task.generated),
            "tokens_evaluated": task.n_prompt,
            "generation_settings": {
                "n_predict": task.n_predict,
                "stream": bool(self.body.get("stream")),
                "reasoning_format": self.model.reasoning_format,
                "lora": [],
            },
            "prompt": self.model.detokenize(task.ids()),
            "has_new_line": False,
            "truncated": task.truncated,
            "stop_type": result.stop_type,
            "stopping_word": task.stopping_word,
            "tokens_cached": task.n_prompt + max(0, len(task.generated) - 1),
            "timings": self.timings(task, result.times),
        }

    def whole(self, ends: dict[int, Done]) -> Any:
        finals = [
            self.final(task, ends[i]) | self.probabilities(task.tops)
            for i, task in sorted(self.tasks.items())
        ]
        return finals if len(finals) > 1 else finals[0]


class OpenAI(Wording):
    """Common to text and chat completions."""

    object = ""
    ending = b"data: [DONE]\n\n"

    def envelope(self, choices: list[Json], **more: Any) -> Json:
        return {
            "choices": choices,
            "created": self.now,
            "model": self.body.get("model") or self.model.path,
            "system_fingerprint": "b0-unknown",
            "object": self.object,
            "id": self.id,
            **more,
        }


class Text(OpenAI):
    """/v1/completions"""

    object = "text_completion"

    def choice(self, task: Task, text: str, finish: str | None) -> Json:
        return {"text": text, "index": task.index, "logprobs": None, "finish_reason": finish}

    def progress(self, task: Task, result: Progress) -> bytes:
        more = self.maybe_timings(task, result.times) | self.prompt_progress(result)
        return event(self.envelope([self.choice(task, "", None)], **more))

    def token(self, task: Task, result: Token) -> bytes:
        choice = self.choice(task, result.text, None)
        return event(self.envelope([choice], **self.maybe_timings(task, result.times)))

    def done(self, task: Task, result: Done) -> bytes:
        choice = self.choice(task, "", FINISH[result.stop_type])
        return event(
            self.envelope([choice], usage=self.usage(task), timings=self.timings(task, result.times))
        )

    def whole(self, ends: dict[int, Done]) -> Any:
        tasks = [task for _, task in sorted(self.tasks.items())]
        choices = [self.choice(task, self.text(task), FINISH[ends[task.index].stop_type]) for task in tasks]
        return self.envelope(
            choices, usage=self.usage(tasks[0]), timings=self.timings(tasks[0], ends[tasks[0].index].times)
        )


class Chat(OpenAI):
    """/v1/chat/completions"""

    object = "chat.completion.chunk"

    def delta(self, task: Task, delta: Json, finish: str | None = None) -> list[Json]:
        return [{"finish_reason": finish, "index": task.index, "delta": delta}]

    def role(self, task: Task) -> list[Json]:
        return self.delta(task, {"role": "assistant", "content": None})

    def progress(self, task: Task, result: Progress) -> bytes:
        more = self.maybe_timings(task, result.times) | self.prompt_progress(result)
        return event(self.envelope(self.role(task), **more))

    def token(self, task: Task, result: Token) -> bytes:
        """The events of one token. The first token has an event with the role; a token without text has no other. The
        last event has the timings.
        """
        deltas = [] if task.index in self.n_begun else [self.role(task)]
        self.n_begun.add(task.index)
        if result.text:
            deltas.append(self.delta(task, {"content": result.text}))
        events = [self.envelope(delta) for delta in deltas]
        if events:
            events[-1] |= self.maybe_timings(task, result.times)
        return b"".join(map(event, events))

    def done(self, task: Task, result: Done) -> bytes:
        last = self.envelope(self.delta(task, {}, FINISH[result.stop_type]))
        if not (self.body.get("stream_options") or {}).get("include_usage"):
            return event(last | {"timings": self.timings(task, result.times)})
        more = {"usage": self.usage(task), "timings": self.timings(task, result.times)}
        return event(last) + event(self.envelope([], **more))

    def whole(self, ends: dict[int, Done]) -> Any:
        tasks = [task for _, task in sorted(self.tasks.items())]
        choices = [
            {
                "finish_reason": FINISH[ends[task.index].stop_type],
                "index": task.index,
                "message": {"role": "assistant", "content": self.text(task)},
            }
            for task in tasks
        ]
        more = {"usage": self.usage(tasks[0]), "timings": self.timings(tasks[0], ends[tasks[0].index].times)}
        return self.envelope(choices, **more) | {"object": "chat.completion"}
