"""Lists of token ids in JSON. Long prompts have 60,000: reading such a list at once takes 3 ms, and writing it too."""

from __future__ import annotations

import asyncio

import orjson

from llamaslot.cache.ids import WIDTH, pack, unpack

_PIECE_BYTES = 1 << 15  # of JSON; about 0.2 ms
_PIECE_TOKENS = 1 << 12  # written in about 0.2 ms
_BEGIN, _END = b'{"tokens":[', b"]}"


async def packed(answer: bytes) -> bytes:
    """The packed tokens in an answer to ``POST /tokenize``. A long answer is read in pieces, between which other tasks
    run. Raises ValueError, TypeError or KeyError if the answer is of another form. Canceling is safe.
    """
    if len(answer) <= 2 * _PIECE_BYTES or not (answer.startswith(_BEGIN) and answer.endswith(_END)):
        return pack(orjson.loads(answer)["tokens"])
    parts, begin, end = list[bytes](), len(_BEGIN), len(answer) - len(_END)
    while begin < end:
        comma = answer.find(b",", begin + _PIECE_BYTES, end)
        cut = comma if comma >= 0 else end
        parts.append(pack(orjson.loads(b"[%b]" % answer[begin:cut])))
        begin = cut + 1
        await asyncio.sleep(0)
    return b"".join(parts)


class TokenList:
    """Writes the tokens of one prompt as JSON. The prompt is sent in parts, each with all tokens before it: what was
    written of the last part is not written again.
    """

    def __init__(self) -> None:
        self._tokens, self._written = b"", b"[]"

    async def written(self, tokens: bytes) -> bytes:
        """``tokens``, packed, as a JSON list. A long list is written in pieces, between which other tasks run. One call
        at a time. Canceling is safe.
        """
        n_known = len(self._tokens)
        if not (n_known and tokens.startswith(self._tokens)):
            n_known = 0
        parts = [self._written[1:-1]] if n_known else []
        for begin in range(n_known, len(tokens), _PIECE_TOKENS * WIDTH):
            if begin > n_known:
                await asyncio.sleep(0)
            parts.append(orjson.dumps(unpack(tokens[begin : begin + _PIECE_TOKENS * WIDTH]))[1:-1])
        self._tokens, self._written = tokens, b"[%b]" % b",".join(parts)
        return self._written
