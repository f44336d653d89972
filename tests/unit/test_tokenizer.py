"""Prompts: what is tokenized in pieces has the tokens of the whole, and whatever breaks that is noticed."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamaslot.cache.ids import count, pack, unpack
from llamaslot.errors import BadRequest, PromptNotTokenizable, UpstreamError
from llamaslot.tokens import tokenize_cache as pieces_module
from llamaslot.tokens.special_tokens import SpecialTokens, SpecialTokensOfEach, TokenSpan
from llamaslot.tokens.tokenize_cache import PartCache, TokenizeCache, spaced
from llamaslot.tokens.tokenizer import Prompt, Tokenizer
from tests.support.turns import with_turns

SPECIALS = ("<|im_start|>", "<|im_end|>", "</s>", "[INST]")
BOS, EOS = 1, 2  # BOS is what </s> is, EOS is in no text


class Server:
    """A template like ChatML, and a tokenizer whose tokens between two special ones depend on where they begin.

    A line is taken three characters at a time, so that a cut anywhere else changes tokens. ``strips``: special tokens
    eat the spaces on both sides. ``has_memory``: what follows a special token is another token when anything came
    before it. ``bos``, ``eos``: added to what is tokenized with ``add_special``.
    """

    def __init__(
        self, *, strips: bool = False, has_memory: bool = False, bos: bool = False, eos: bool = False
    ) -> None:
        self.strips, self.has_memory, self.bos, self.eos = strips, has_memory, bos, eos
        self.ids: dict[str, int] = {"</s>": BOS}
        self.specials: tuple[str, ...] = SPECIALS
        self.requests: list[str] = []
        self.bodies: list[Mapping[str, Any]] = []
        self.thinks = False
        self.refuses = False
        self.fails: UpstreamError | None = None

    def _id(self, text: str) -> int:
        return self.ids.setdefault(text, len(self.ids) + 10)

    def tokens(self, content: str, *, add_special: bool = True, parse_special: bool = True) -> bytes:
        pattern = "|".join(map(re.escape, sorted(self.specials, key=len, reverse=True)))
        parts = re.split(f"({pattern})", content) if parse_special and pattern else [content]
        ids = [BOS] if add_special and self.bos else []
        for i, part in enumerate(parts):
            if i % 2:
                ids.append(self._id(part))
                continue
            if self.strips:
                part = part.lstrip(" ") if i else part
                part = part.rstrip(" ") if i + 1 < len(parts) else part
            chunks = re.findall(r"ab[^\n]|\n|[^\n]{1,3}", part)
            ids += [self._id(f"{chunk} (plain)") for chunk in chunks]
            if self.has_memory and chunks and i and (i > 2 or parts[0]):
                ids[-len(chunks)] = self._id(f"{chunks[0]} (later)")
        return pack([*ids, EOS] if add_special and self.eos else ids)

    async def tokenize(self, content: str, *, add_special: bool, parse_special: bool = True) -> bytes:
        self.requests.append(content)
        await asyncio.sleep(0)
        if self.fails is not None:
            raise self.fails
        return self.tokens(content, add_special=add_special, parse_special=parse_special)

    async def apply_template(self, body: Mapping[str, Any], raw: bytes | None = None) -> str:
        self.bodies.append(body)
        await asyncio.sleep(0)
        messages = list(body["messages"])
        is_prefilled = messages[-1]["role"] == "assistant"
        if self.refuses or (self.thinks and is_prefilled):
            raise UpstreamError(400, b'{"error": {"message": "no"}}')
        answer = messages.pop()["content"] if is_prefilled else ""
        tools = "".join(f"<|im_start|>tools\n{tool}<|im_end|>\n" for tool in body.get("tools", ()))
        turns = (f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in messages)
        return f"{tools}{''.join(turns)}<|im_start|>assistant\n{answer}"


def turns(*contents: str, system: str | None = None) -> dict[str, Any]:
    """A chat body: user and assistant in turns."""
    head = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    return {
        "messages": [*head, *({"role": roles[i % 2], "content": text} for i, text in enumerate(contents))]
    }


LONG = "the quick brown fox jumps over a lazy dog. " * 10


async def follow_up(prompts: Tokenizer, n_turns: int = 3) -> list[Prompt]:
    """A conversation of so many user turns; the prompts of each."""
    contents = [f"{LONG}{i}" for i in range(2 * n_turns - 1)]
    return [await prompts.chat(turns(*contents[: 2 * i + 1])) for i in range(n_turns)]


# Tokens of texts


async def test_a_follow_up_turn_tokenizes_what_is_new() -> None:
    """Sent is the last answer with the role header before it, from the end of the message before that on."""
    server = Server()
    prompts = Tokenizer(server)
    await follow_up(prompts, 3)
    server.requests.clear()
    contents = [f"{LONG}{i}" for i in range(7)]
    prompt = await prompts.chat(turns(*contents))
    assert prompt.tokens == server.tokens(str(prompt.text))
    assert not prompt.whole
    (sent,) = server.requests
    assert (
        sent
        == str(prompt.text)[str(prompt.text).index(f"<|im_end|>\n<|im_start|>assistant\n{contents[5]}") :]
    )


async def test_an_answer_that_came_back_changed_is_tokenized_again() -> None:
    """What is common with an earlier text ends inside of a message: it is cut before that message."""
    server = Server()
    prompts = Tokenizer(server)
    await follow_up(prompts, 3)
    prompt = await prompts.chat(turns(f"{LONG}0", f"{LONG}!", f"{LONG}2", f"{LONG}3", f"{LONG}4"))
    assert prompt.tokens == server.tokens(str(prompt.text))
    assert not prompt.whole


SNIPPETS = st.sampled_from(
    [
        *SPECIALS,
        "]~!b",
        "]~!b[",
        "[",
        "<div>",
        "<|",
        "|>",
        " ",
        "   ",
        "\n",
        "a",
        "ab",
        "abc",
        "ü漢🎉",
        "[TODO]",
        "<|im_",
        "x" * 30,
    ]
)
CONTENT = st.lists(SNIPPETS, max_size=12).map("".join)
KINDS = st.sampled_from([{}, {"strips": True}, {"bos": True}, {"eos": True}, {"bos": True, "strips": True}])


@given(
    steps=st.lists(st.tuples(st.integers(0, 20), CONTENT), min_size=1, max_size=20),
    kind=KINDS,
    cache_bytes=st.sampled_from([1 << 20, 6_000]),
    more=st.sampled_from([(), ("]~!b", "]~!b["), ("<|im_end|>", "</s><|im_end|>")]),
)
@settings(max_examples=100, deadline=None)
def test_tokens_in_pieces_are_the_tokens_of_the_whole(
    steps: list[tuple[int, str]], kind: dict[str, bool], cache_bytes: int, more: tuple[str, ...]
) -> None:
    """For conversations that grow and branch at random, whatever tokenizer, with room for all or for few of them;
    also if a special token begins with another.
    """

    async def grow() -> None:
        server = Server(**kind)
        server.specials += more
        prompts = Tokenizer(server, cache_bytes=cache_bytes)
        grown: list[list[str]] = [[]]
        for parent, content in steps:
            contents = [*grown[parent % len(grown)], content]
            grown.append(contents)
            prompt = await prompts.chat(turns(*contents))
            assert unpack(prompt.tokens) == unpack(server.tokens(str(prompt.text)))
            prompts.check()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces_module, "SPACING", 12)
        asyncio.run(grow())


@pytest.mark.parametrize("kind", [{"strips": True}, {"bos": True}])
async def test_what_a_special_token_does_to_its_neighbours_does_not_matter(kind: dict[str, bool]) -> None:
    """Spaces that are stripped around special tokens, and BOS in front: such prompts are still cut."""
    server = Server(**kind)
    prompts = Tokenizer(server)
    for content in (f"  {LONG}  ", f"{LONG}  </s>  x  "):
        bodies = [turns(content), turns(content, content, content)]
        answers = [await prompts.chat(body) for body in bodies]
        assert [prompt.tokens for prompt in answers] == [
            server.tokens(str(prompt.text)) for prompt in answers
        ]
        assert not answers[-1].whole


@pytest.mark.parametrize("kind", [{"has_memory": True}, {"eos": True}])
async def test_a_tokenizer_that_cannot_be_cut_is_found_out_before_the_first_cut(
    kind: dict[str, bool], caplog: pytest.LogCaptureFixture
) -> None:
    """A tokenizer with a memory, or EOS behind everything: tokens stay right, and the log says so once per token."""
    server = Server(**kind)
    with caplog.at_level(logging.WARNING):
        answers = await follow_up(Tokenizer(server), 5)
    assert [prompt.tokens for prompt in answers] == [server.tokens(str(prompt.text)) for prompt in answers]
    assert all(prompt.whole for prompt in answers)
    assert len(caplog.records) == len({record.getMessage() for record in caplog.records}) > 0


async def test_a_dropped_special_token_is_not_learned_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also not when so many candidates were judged that all of them are judged anew."""
    monkeypatch.setattr("llamaslot.tokens.special_tokens._JUDGED_MAX", 1)
    specials = SpecialTokens(Server())
    await specials.learn("<|im_start|> <|im_end|> </s>")
    assert specials.drop("</s>")
    assert not specials.drop("</s>")
    await specials.learn("<b> </s>")
    await specials.learn("<i> </s>")
    assert repr(specials) == "<Specials <|im_end|> <|im_start|>>"


@pytest.mark.parametrize("word", ["project-zebra", "|zebra|"])
async def test_no_user_can_tell_which_special_tokens_others_use(word: str) -> None:
    """What looks like one is asked about for each user, and so is what is tried out before the first cut at it; once
    for all where texts are no secret."""
    server = Server()
    server.specials = (*SPECIALS, "<|zebra|>")
    prompts = Tokenizer(server)

    async def n_asked(whose: str, word: str) -> list[int]:
        found = []
        for more in ("", "and", "why"):
            server.requests.clear()
            await prompts.chat(turns(f"{LONG}<{word}>{LONG}", *[more] * bool(more)), whose)
            found.append(len(server.requests))
        return found

    for whose in ("anna", "bert"):
        await prompts.chat(turns("hello"), whose)
    fresh = await n_asked("anna", word)
    assert await n_asked("bert", word) == fresh
    assert await n_asked("anna", word) != fresh


async def test_special_tokens_of_the_users_seen_last_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also that there are none; of others they are learned again."""
    monkeypatch.setattr("llamaslot.tokens.special_tokens._USERS_MAX", 2)
    each = SpecialTokensOfEach(Server())
    anna, bert = each.of("anna"), each.of("bert")
    assert each.of("anna") is anna
    each.of("carl")
    assert each.of("anna") is anna
    assert each.of("bert") is not bert


async def test_markup_costs_few_requests() -> None:
    """A page with hundreds of different tags is judged in one pair of requests, and only once."""
    server = Server()
    page = "".join(f"<tag{i}>text</tag{i}>" for i in range(120)) + LONG
    prompts = Tokenizer(server)
    await prompts.chat(turns(page))
    assert len(server.requests) <= 1 + 2 * 2 + 2  # the text, two likely ones, the rest
    server.requests.clear()
    await prompts.chat(turns(page, "yes"))
    assert len(server.requests) == 1 + 3  # the tail, and the proof of the cut


async def test_special_tokens_are_found_among_many_that_are_none() -> None:
    """One among tags is found by halving the group."""
    server = Server()
    server.specials = ("<turn_17x>",)
    specials = SpecialTokens(server)
    await specials.learn(" ".join(f"<{i}b> <{i}a>" for i in range(100)) + "<turn_17x>")
    assert repr(specials) == "<Specials <turn_17x>>"
    server.specials = ("<57b>",)
    specials = SpecialTokens(server)
    await specials.learn(" ".join(f"<{i}b> <{i}a>" for i in range(100)))
    assert repr(specials) == "<Specials <57b>>"


async def test_what_only_contains_a_special_token_is_none() -> None:
    """It has other tokens when special tokens are read, but not one."""
    server = Server()
    server.specials = ("|im_",)
    specials = SpecialTokens(server)
    await specials.learn("<|im_start|> <|im_end|>")
    assert len(specials) == 0


async def test_other_tasks_run_while_special_tokens_are_located() -> None:
    """They are found in each slice, and at its ends."""
    server = Server()
    specials = SpecialTokens(server)
    await specials.learn("<|im_start|> <|im_end|>")
    slice_tokens = (1 << 20) // 4
    where = [0, slice_tokens - 1, slice_tokens, 3 * slice_tokens - 1]
    ids = [3] * (3 * slice_tokens)
    for i in where:
        ids[i] = server.ids["<|im_start|>"]
    marks = [TokenSpan(i, i + 1, server.ids["<|im_start|>"]) for i in where]
    found, n_turns = await with_turns(specials.locate(marks, pack(ids), may_add=False))
    assert found == where
    assert n_turns == 2


async def test_other_tasks_run_before_many_ids_are_packed() -> None:
    """They have just been checked: both together would take 40 ms of two million."""
    n_turns = list[int]()
    for n in (100, (1 << 20) // 4):
        (prompt,), turns_had = await with_turns(Tokenizer(Server()).completion([5] * n))
        assert prompt.tokens == pack([5] * n)
        n_turns.append(turns_had)
    assert n_turns == [0, 1]


async def test_special_tokens_in_another_order_locate_nothing() -> None:
    """Text and tokens must agree on every one of them, but for BOS in front."""
    server = Server()
    specials = SpecialTokens(server)
    await specials.learn("<|im_start|> <|im_end|>")
    start, end = server.ids["<|im_start|>"], server.ids["<|im_end|>"]
    marks = [TokenSpan(0, 12, start), TokenSpan(20, 30, end)]
    assert await specials.locate(marks, pack([start, 3, end]), may_add=True) == [0, 2]
    assert await specials.locate(marks, pack([end, 3, start]), may_add=True) is None
    assert await specials.locate(marks, pack([start, 3]), may_add=True) is None
    assert await specials.locate(marks, pack([end, start, 3, end]), may_add=True) == [1, 3]
    assert await specials.locate(marks, pack([end, start, 3, end]), may_add=False) is None
    assert await specials.locate(marks, pack([3, end, start, 3, end]), may_add=True) is None


async def test_a_server_exchanged_unnoticed_is_not_cut_at_the_old_ones_special_tokens() -> None:
    """What was proved does not hold any more: the first token of the tail shows it."""
    server = Server()
    prompts = Tokenizer(server)
    await follow_up(prompts, 3)
    server.specials = ()
    server.ids = {}
    prompt = (await follow_up(prompts, 4))[-1]
    assert prompt.whole
    assert prompt.tokens == server.tokens(str(prompt.text))


async def test_the_longest_special_token_is_found() -> None:
    """One that begins like another is that one and not the shorter."""
    server = Server()
    server.specials = ("]~!b", "]~!b[")
    specials = SpecialTokens(server)
    await specials.learn("]~!b system ]~!b[")
    short, long = server.ids["]~!b"], server.ids["]~!b["]
    assert specials.find("x]~!b[ ]~!b") == [TokenSpan(1, 6, long), TokenSpan(7, 11, short)]


async def test_failing_to_learn_fails_no_request() -> None:
    """The tokens of the prompt are there: special tokens are learned another time."""

    class Flaky(Server):
        async def tokenize(self, content: str, *, add_special: bool, parse_special: bool = True) -> bytes:
            self.fails = None if parse_special else UpstreamError(500, b"")
            return await super().tokenize(content, add_special=add_special, parse_special=parse_special)

    server = Flaky()
    answers = await follow_up(Tokenizer(server), 2)
    assert [prompt.tokens for prompt in answers] == [server.tokens(str(prompt.text)) for prompt in answers]


async def test_errors_of_the_server_pass_through() -> None:
    """The client gets llama-server's own answer."""
    server = Server()
    server.fails = UpstreamError(503, b"loading")
    with pytest.raises(UpstreamError, match="loading"):
        await Tokenizer(server).chat(turns("x"))
    server.refuses = True
    with pytest.raises(UpstreamError, match="no"):
        await Tokenizer(server).chat(turns("x"))


async def test_canceling_is_safe_at_every_await() -> None:
    """Cut off after any number of steps, the next one who asks gets the right tokens."""
    for n_steps in range(40):
        server = Server()
        prompts = Tokenizer(server)
        task = asyncio.get_running_loop().create_task(follow_up(prompts))
        for _ in range(n_steps):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        answers = await follow_up(prompts)
        assert [prompt.tokens for prompt in answers] == [
            server.tokens(str(prompt.text)) for prompt in answers
        ]
        prompts.check()


async def test_conversations_at_the_same_time_do_not_disturb_each_other() -> None:
    """Special tokens that one of them learns while another is being tokenized are no harm."""
    server = Server()
    prompts = Tokenizer(server)

    async def converse(name: str) -> None:
        contents: list[str] = []
        for i in range(6):
            contents += [f"{name} {SPECIALS[i % 4]} {LONG}{i}", LONG]
            prompt = await prompts.chat(turns(*contents[:-1]))
            assert prompt.tokens == server.tokens(str(prompt.text))
            prompts.check()

    await asyncio.gather(*(converse(name) for name in "pqrs"))


# What is remembered


async def test_the_least_recently_used_text_goes_first() -> None:
    """The limit holds after each text; what was used last stays; what two have in common stays with either."""
    pieces, specials = TokenizeCache(limit_bytes=6_000), SpecialTokens(Server())
    mark = "</s>"
    await specials.learn(mark)

    def keep(name: str) -> str:
        text = f"{'common ' * 40}{mark}{name * 300}{mark}{name * 300}{mark}"
        known = pieces.find(text, specials)
        cuts = spaced(specials.find(text, known.begin), known.begin)
        pieces.keep(text, known, cuts, [10, 20, 30][known.n_cuts :], pack(range(30)))
        pieces.check()
        return text

    def n_known(*texts: str) -> list[int]:
        return [pieces.find(text, specials).n_cuts for text in texts]

    a, b, c = keep("a"), keep("b"), keep("c")
    assert n_known(a, b, c) == [3, 3, 3]
    keep("a")
    keep("d")
    assert n_known(a, b, c) == [3, 1, 3]
    assert pieces.find(a, specials).tokens == pack(range(30))


async def test_what_was_dropped_while_its_text_was_tokenized_is_stored_again() -> None:
    """Another text may have taken its room since it was found."""
    pieces, specials = TokenizeCache(limit_bytes=2_500), SpecialTokens(Server())
    await specials.learn("</s>")
    texts = [f"{name * 300}</s>" for name in "ab"]
    for text in (texts[0], texts[1]):
        cuts = spaced(specials.find(text))
        pieces.keep(text, pieces.find(text, specials), cuts, [10], pack(range(10)))
    known = pieces.find(texts[0], specials)
    pieces._forget(known.path[0])
    pieces.keep(texts[0], known, [], [], pack(range(10)))
    pieces.check()
    assert pieces.find(texts[0], specials) != known
    assert pieces.find(texts[0], specials).tokens == known.tokens


async def test_a_known_beginning_is_not_searched_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its special tokens were found with the earlier text; the work for a follow-up is that for its new part."""
    server = Server()
    prompts = Tokenizer(server)
    await follow_up(prompts, 4)
    begun, find = list[int](), SpecialTokens.find

    def counting(self: SpecialTokens, text: str, begin: int = 0) -> list[TokenSpan]:
        begun.append(len(text) - begin)
        return find(self, text, begin)

    monkeypatch.setattr(SpecialTokens, "find", counting)
    monkeypatch.setattr(SpecialTokens, "first", None)  # the slow way
    server.requests.clear()
    (*_, last) = await follow_up(prompts, 5)
    assert last.tokens == server.tokens(str(last.text))
    assert max(begun) < 3 * len(LONG) < len(str(last.text))
    assert sum(map(len, server.requests)) < 3 * len(LONG) * len(begun)


async def test_a_piece_with_many_continuations_is_found_too() -> None:
    """Too many to compare with each."""
    server = Server()
    prompts = Tokenizer(server)
    for _ in range(2):
        server.requests.clear()
        for i in range(10):
            prompt = await prompts.chat(turns(LONG, f"{i} {LONG}", LONG))
            assert prompt.tokens == server.tokens(str(prompt.text))
    assert max(map(len, server.requests)) < 2 * len(LONG)


async def test_a_known_piece_may_end_inside_of_a_longer_special_token() -> None:
    """Then it is no piece of that text: the longer one has other tokens."""
    server = Server()
    server.specials = ("]~!b[", "]~!b")
    prompts = Tokenizer(server)
    for end in ("]~!b x", "]~!b[", "]~!b x", "]~!b[ x", "]~!b"):
        (prompt,) = await prompts.completion(f"{LONG}{end}{LONG}]~!b {LONG}")
        assert prompt.tokens == server.tokens(str(prompt.text))
    specials = prompts._model.specials.of("")
    assert [specials.stands_alone(each) for each in (*server.specials, "other")] == [True, False, False]


async def test_a_text_of_special_tokens_only_is_kept_in_few_pieces() -> None:
    """300 kB of them: no more than one piece for each SPACING characters."""
    server = Server()
    prompts = Tokenizer(server)
    text = "</s>" * 75_000
    await prompts.completion(text)
    assert (await prompts.completion(text))[0].tokens == server.tokens(text)
    assert prompts.check() <= len(text) // pieces_module.SPACING


# The guard


async def test_a_miscount_ends_the_cutting(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """From then on prompts are tokenized whole; it is said once."""
    server = Server()
    prompts = Tokenizer(server)
    *_, last = await follow_up(prompts)
    assert prompts.confirm(last, last.n_tokens)
    with caplog.at_level(logging.WARNING):
        assert not prompts.confirm(last, last.n_tokens - 1)
        assert not prompts.confirm(last, last.n_tokens + 1)
    assert len(caplog.records) == 1
    assert all(prompt.whole for prompt in await follow_up(prompts))


# Completion prompts


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("", [[BOS]]),
        ("ab</s>", [[BOS, "ab (plain)", "</s>"]]),
        ([5, 6], [[5, 6]]),
        ([[]], [[]]),
        ([[5], [6, 7]], [[5], [6, 7]]),
        (["x", "y"], [[BOS, "x (plain)"], [BOS, "y (plain)"]]),
        (["x", 5, "y"], [[BOS, "x (plain)", 5, "y (plain)"]]),
        ([5, "x"], [[5, "x (plain)"]]),
        (["x", [5, "y"]], [[BOS, "x (plain)"], [5, "y (plain)"]]),
        ([5, "x", True, 2.7], [[5, "x (plain)", 1, 2]]),
        ([2**32 + 5], [[5]]),
        ({"prompt_string": "x"}, [[BOS, "x (plain)"]]),
        ([{"prompt_string": ["x", "y"]}, [3]], [[BOS, "x (plain)", "y (plain)"], [3]]),
    ],
)
async def test_completion_prompts_are_read_as_llama_server_reads_them(
    prompt: Any, expected: list[list[Any]]
) -> None:
    """Strings, ids, both mixed, and lists of those; BOS only where a string stands first."""
    server = Server(bos=True)
    got = [unpack(each.tokens) for each in await Tokenizer(server).completion(prompt)]
    assert got == [[server.ids[x] if isinstance(x, str) else x for x in each] for each in expected]


@pytest.mark.parametrize(
    "prompt",
    [
        None,
        3,
        True,
        [],
        {},
        [None],
        [1, None],
        [1, 2.0],
        [1.5, "x"],
        [True, 1],
        [[["x"]]],
        [["x", "y"]],
        [1, "x", [2]],
    ],
)
async def test_what_is_no_completion_prompt_is_a_bad_request(prompt: Any) -> None:
    """Nothing but strings, integers and lists of them."""
    with pytest.raises(BadRequest, match="prompt"):
        await Tokenizer(Server()).completion(prompt)


@pytest.mark.parametrize("prompt", [["x"] * 1025, ["x", 5] * 1025, [["x", 1], {"prompt_string": "y"}] * 513])
async def test_more_texts_than_the_server_can_be_asked_about_are_refused(prompt: Any) -> None:
    """At once, and not after a thousand questions. Ids need none, however many there are."""
    server = Server()
    with pytest.raises(BadRequest, match=r"texts: send at most 1024 in one request"):
        await Tokenizer(server).completion(prompt)
    assert server.requests == []
    assert len(await Tokenizer(server).completion(["x"] * 1024)) == 1024
    assert len(await Tokenizer(server).completion([[5, 6]] * 3000)) == 3000


async def test_prompts_with_media_are_opaque() -> None:
    """They are not even rendered: llama-server would load their images a second time."""
    server = Server()
    with pytest.raises(PromptNotTokenizable):
        await Tokenizer(server).completion({"prompt_string": "x", "multimodal_data": ["AA=="]})
    parts = [{"type": "text", "text": "what is this?"}, {"type": "image_url", "image_url": {"url": "data:"}}]
    with pytest.raises(PromptNotTokenizable):
        await Tokenizer(server).chat({"messages": [{"role": "user", "content": parts}]})
    assert server.bodies == []


# Boundaries


async def texts_of_boundaries(server: Server, body: dict[str, Any]) -> list[str]:
    """The text up to each boundary, which has to be one of whole tokens."""
    prompts = Tokenizer(server)
    prompt = await prompts.chat(body)
    text = str(prompt.text)
    found = (await prompts.boundaries(body, prompt)).stops
    ends = {count(server.tokens(text[:end])): end for end in range(len(text) + 1)}
    return [text[: ends[n]] for n in found]


async def test_boundaries_are_the_ends_of_the_system_part_and_of_the_last_user_message() -> None:
    """With tools in the system part and tool results behind the user's message; both with the next role's header."""
    body = turns("Xenon?", "a", "x-rays?", "x y z", system="Be kind.")
    body["messages"].append({"role": "tool", "content": "42"})
    body["tools"] = ["hammer"]
    server = Server()
    system, user = await texts_of_boundaries(server, body)
    assert system.endswith("hammer<|im_end|>\n<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n")
    assert user.endswith("x-rays?<|im_end|>\n<|im_start|>assistant\n")
    assert all(variant["tools"] == ["hammer"] for variant in server.bodies)


async def test_a_boundary_at_the_end_of_the_prompt_is_none() -> None:
    """The user's message is the last: only the end of the system part remains."""
    (system,) = await texts_of_boundaries(Server(), turns("why?", system="Be kind."))
    assert system.endswith("<|im_start|>user\n")


async def test_a_template_that_refuses_to_continue_an_answer_is_asked_otherwise() -> None:
    """With thinking on, llama-server answers 400 to a last message of the assistant."""
    body = turns("why?", "because", system="Be kind.")
    body["messages"].append({"role": "tool", "content": "42"})
    server = Server()
    server.thinks = True
    _, user = await texts_of_boundaries(server, body)
    assert user.endswith("why?<|im_end|>\n<|im_start|>assistant\n")


async def test_the_reasoning_that_an_answer_begins_with_is_behind_the_boundary() -> None:
    """It is gone from the next turn, so a cut behind <think> would be too late for it."""

    class Thinking(Server):
        async def apply_template(self, body: Mapping[str, Any], raw: bytes | None = None) -> str:
            text = await super().apply_template(body)
            last = text.rindex("assistant\n") + len("assistant\n")
            return f"{text[:last]}<think>\n{text[last:]}"

    body = turns("why?", "<think>\nhm</think>because", system="Be kind.")
    body["messages"].append({"role": "tool", "content": "42"})
    _, user = await texts_of_boundaries(Thinking(), body)
    assert user.endswith("why?<|im_end|>\n<|im_start|>assistant\n")


async def test_tools_that_stand_before_the_last_user_message_give_two_boundaries() -> None:
    """One for the next turn, where they will have moved on, and one for as long as this turn lasts."""

    class Moving(Server):
        async def apply_template(self, body: Mapping[str, Any], raw: bytes | None = None) -> str:
            text = await super().apply_template(body)
            last = text.rindex("<|im_start|>user")
            return f"{text[:last]}<|im_start|>tools\n{LONG}<|im_end|>\n{text[last:]}"

    body = turns("one", "two", "three", system="Be kind.")
    body["messages"].append({"role": "tool", "content": "42"})
    _, later, now = await texts_of_boundaries(Moving(), body)
    assert later.endswith("two<|im_end|>\n<|im_start|>")
    assert now.endswith("three<|im_end|>\n<|im_start|>")


async def test_the_end_of_a_question_is_asked_for_once() -> None:
    """However many tools are called to answer it."""
    server = Server()
    prompts, messages = Tokenizer(server), turns("one", "two", "x-rays?", system="Be kind.")["messages"]
    for number in range(4):
        messages += [{"role": "assistant", "content": "I look."}, {"role": "tool", "content": f"{number}"}]
        prompt = await prompts.chat({"messages": messages})
        n_before = len(server.bodies)
        _, user = (await prompts.boundaries({"messages": messages}, prompt)).stops
        assert len(server.bodies) == n_before + (3 if number == 0 else 0)
        text = str(prompt.text)
        assert count(server.tokens(text[: text.index("I look.")])) == user


async def test_what_stands_behind_a_question_is_asked_for_once() -> None:
    """As long as a template writes the same there: then the next question costs none, nor do the tools behind it."""

    class Thinking(Server):
        async def apply_template(self, body: Mapping[str, Any], raw: bytes | None = None) -> str:
            text = await super().apply_template(body)
            is_asked = body["messages"][-1]["role"] in ("user", "tool")
            return f"{text}<think>\n" if is_asked else text

    server = Thinking()
    prompts = Tokenizer(server)
    for number, question in enumerate(("why?", "x-rays?", "xenon?")):
        body = turns(question, system="Be kind.")
        prompt = await prompts.chat(body)
        n_before = len(server.bodies)
        _, user = (await prompts.boundaries(body, prompt)).stops
        assert len(server.bodies) == n_before + (3 if number == 0 else 0)
        assert str(prompt.text).endswith("<|im_start|>assistant\n<think>\n")
        assert user == count(server.tokens(str(prompt.text).removesuffix("<think>\n")))
        more = [{"role": "assistant", "content": "I look."}, {"role": "tool", "content": "42"}]
        body["messages"] += more
        prompt = await prompts.chat(body)
        n_before = len(server.bodies)
        assert user in (await prompts.boundaries(body, prompt)).stops
        assert len(server.bodies) == n_before
    other = {**turns("why?", system="Be kind."), "chat_template_kwargs": {"enable_thinking": False}}
    prompt = await prompts.chat(other)
    n_before = len(server.bodies)
    await prompts.boundaries(other, prompt)
    assert len(server.bodies) == n_before + 3


async def test_the_end_of_the_system_part_is_asked_for_once() -> None:
    """Whatever the conversation: the next one with the same system part and tools costs no further question."""
    server = Server()
    prompts = Tokenizer(server)
    ends = list[int]()
    for question in ("why?", "x-rays?", "xenon?"):
        body = {
            **turns(question, "so", "and?", system="Be kind."),
            "tools": ["hammer"],
            "temperature": len(ends),
        }
        prompt = await prompts.chat(body)
        n_asked = len(server.bodies)
        ends.append(await prompts.system_end(body, prompt))
        text = str(prompt.text)
        assert count(server.tokens(text[: text.index(question)])) == ends[-1]
        assert len(server.bodies) == n_asked + (len(ends) == 1)


async def test_other_tools_are_another_system_part() -> None:
    """Its end lies elsewhere."""
    server = Server()
    prompts = Tokenizer(server)
    ends = set()
    for tools in (["hammer"], ["hammer", "a much longer tongs"]):
        body = {**turns("why?", system="Be kind."), "tools": tools}
        ends.add(await prompts.system_end(body, await prompts.chat(body)))
    assert len(ends) == 2


async def test_the_end_of_the_system_part_is_remembered_for_each_user() -> None:
    """By the time that it takes one could tell what another has asked."""
    server = Server()
    prompts, body, n_asked = Tokenizer(server), turns("why?", system="Be kind."), list[int]()
    for user in ("anna", "anna", "bert"):
        prompt = await prompts.chat(body, user)
        n_before = len(server.bodies)
        await prompts.system_end(body, prompt)
        n_asked.append(len(server.bodies) - n_before)
    assert n_asked == [1, 0, 1]


async def test_the_ends_of_a_hundred_users_system_parts_are_remembered() -> None:
    """Each has an entry of its own: else nobody of so many would find his again."""
    server = Server()
    prompts, body = Tokenizer(server), turns("why?", system="Be kind.")
    for _ in range(2):
        server.bodies.clear()
        for i in range(100):
            await prompts.system_end(body, await prompts.chat(body, f"user {i}"))
    assert len(server.bodies) == 100, "for the prompts themselves"


def test_system_parts_take_so_many_bytes_at_most() -> None:
    """Those used last stay; one that two have asked for at once is counted once."""
    systems = PartCache(limit_bytes=10_000)
    for i in range(20):
        systems.keep(b"made of %d" % i, bytes(1000))
        systems.keep(b"made of %d" % i, bytes(1000))
        assert systems.find(b"made of 0") is not None
    assert systems.size_bytes == 1200 * len(systems) <= 10_000
    assert [i for i in range(20) if systems.find(b"made of %d" % i)] == [0, *range(13, 20)]


async def test_without_a_system_part_nothing_is_asked() -> None:
    """The role of the first message is all that such prompts have in common."""
    server = Server()
    prompts = Tokenizer(server)
    prompt = await prompts.chat(turns("why?"))
    n_asked = len(server.bodies)
    assert await prompts.system_end(turns("why?"), prompt) == 0
    assert len(server.bodies) == n_asked


async def text_of_opening(body: dict[str, Any], server: Server | None = None) -> str:
    server = server or Server()
    prompt, n_tokens = await Tokenizer(server).opening(body)
    text = str(prompt.text)
    ends = {count(server.tokens(text[:end])): end for end in range(len(text) + 1)}
    return text[: ends[n_tokens]]


async def test_an_opening_ends_where_the_first_question_begins() -> None:
    """The system messages and the tools; what the body has behind them does not matter."""
    body = {**turns("why?", "because", system="Be kind."), "tools": ["hammer"]}
    text = await text_of_opening(body)
    assert text.endswith("hammer<|im_end|>\n<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n")
    assert await text_of_opening({**turns(system="Be kind."), "tools": ["hammer"]}) == text


async def test_without_a_system_part_the_whole_conversation_is_the_opening() -> None:
    """Up to the header of what comes next: the answer to its last question, or the next question."""
    assert (await text_of_opening(turns("long"))).endswith("long<|im_end|>\n<|im_start|>assistant\n")
    assert (await text_of_opening(turns("long", "so"))).endswith("so<|im_end|>\n<|im_start|>user\n")


async def test_a_template_that_refuses_the_variants_gives_no_boundaries() -> None:
    """Nothing fails: the prompt is only cut at fewer places."""
    server = Server()
    prompts = Tokenizer(server)
    body = turns("why?", "because", "really?")
    prompt = await prompts.chat(body)
    server.refuses = True
    assert await prompts.boundaries(body, prompt) == (0, ())
