"""What a request will need, before anybody knows."""

from __future__ import annotations

from llamaslot.core.policy import Rules
from llamaslot.core.slots import Job
from llamaslot.engine.pool import Pool

_SHORT_ANSWER = 64  # tokens: a title, a label
_LITTLE = 0.1  # of what a usual answer takes, so that it holds nobody up


def answer_s(pool: Pool | None, job: Job, running_s: float = 0.0) -> float:
    """How long its answer takes, in seconds, from when it has been ``running_s``. 0 without a pool: then nothing is
    known of rates."""
    if pool is None:
        return 0.0
    return pool.rates.answer.seconds_left(running_s, job.max_tokens)


def estimate(pool: Pool | None, job: Job, rules: Rules) -> tuple[float, bool]:
    """For how long it will have a slot, in seconds, and whether it is a side request: a small prompt, or a short answer
    to one of which little is missing."""
    if pool is None:
        prefill_s = little_s = 0.0
    else:
        prefill_s = pool.missing_s(job)
        little_s = max(pool.long_s, _LITTLE * pool.rates.answer.seconds_left(0.0))
    is_small = 0 < job.n_tokens < rules.small_prompt_tokens
    is_short = job.max_tokens is not None and job.max_tokens <= _SHORT_ANSWER
    return prefill_s + answer_s(pool, job), is_small or (is_short and prefill_s <= little_s)
