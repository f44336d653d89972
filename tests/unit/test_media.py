"""Where the first medium of a chat stands, and what comes before it."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from llamaslot.errors import PromptNotTokenizable, Reason
from llamaslot.tokens import media
from llamaslot.tokens.media import PLACE

IMAGE = {"type": "image_url", "image_url": {"url": "http://x/1.png"}}
AUDIO = {"type": "input_audio", "input_audio": {"data": "aGk=", "format": "wav"}}


def text(said: str) -> dict[str, Any]:
    return {"type": "text", "text": said}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


SYSTEM = {"role": "system", "content": "be brief"}


@pytest.mark.parametrize(
    ("messages", "kinds"),
    [
        ([SYSTEM, user(text("hi"))], set()),
        ([SYSTEM, user(text("hi"), IMAGE, text("?")), user(AUDIO)], {"image_url", "input_audio"}),
        ("no list", set()),
        (["no object", {"role": "user", "content": ["no part"]}], set()),
    ],
)
def test_what_media_a_chat_has(messages: Any, kinds: set[str]) -> None:
    """By their types."""
    assert media.kinds({"messages": messages}) == kinds
    assert media.has_media({"messages": messages}) == bool(kinds)


def test_unknown_parts() -> None:
    """llama-server's 400 says it best."""
    with pytest.raises(PromptNotTokenizable, match="file"):
        media.kinds({"messages": [user({"type": "file"})]})


def test_a_chat_is_cut_at_its_first_medium() -> None:
    """What comes before it is as it was, and so are all other fields; nothing of the medium is left."""
    body = {
        "messages": [SYSTEM, user(text("a")), user(text("b"), IMAGE, text("c")), user(AUDIO)],
        "tools": [1],
        "continue_final_message": True,
    }
    assert media.up_to_medium(body) == {
        "messages": [SYSTEM, user(text("a")), user(text("b"), text(PLACE))],
        "tools": [1],
    }


@pytest.mark.parametrize(
    ("rendered", "said", "before"),
    [
        (f"<user>hi{PLACE}</user>", "hi", "<user>hi"),
        (f"<user>hi\n{PLACE}</user>", "hi", "<user>hi"),  # texts were joined; a medium is not
        (f"<user>hi\n{PLACE}</user>", "hi\n", "<user>hi\n"),
        (f"<user>hi\n\n{PLACE}</user>", "hi\n", "<user>hi\n"),
        (f"<user>\n{PLACE}</user>", None, "<user>\n"),
    ],
)
def test_the_text_before_a_medium(rendered: str, said: str | None, before: str) -> None:
    """Without what only joins it to a text."""
    parts = [text(PLACE)] if said is None else [text(said), text(PLACE)]
    assert media.text_before(rendered, {"messages": [user(*parts)]}) == before


def test_a_part_before_the_medium_that_is_no_object() -> None:
    """Should a server render that, it is right about it."""
    body = {"messages": [user("hi", IMAGE)]}
    assert media.text_before(f"<user>hi{PLACE}", media.up_to_medium(body)) == "<user>hi"


@pytest.mark.parametrize(("rendered", "why"), [("<user></user>", Reason.TEMPLATE), (PLACE, Reason.MEDIA)])
def test_nothing_that_could_be_told(rendered: str, why: Reason) -> None:
    """The template leaves it out, or the medium comes first of all."""
    with pytest.raises(PromptNotTokenizable) as error:
        media.text_before(rendered, {"messages": [user(text(PLACE))]})
    assert error.value.reason is why


@pytest.mark.parametrize(
    ("prompt", "before"),
    [
        ("hi", None),
        (["hi"], None),
        ({"prompt_string": "hi"}, None),
        ({"prompt_string": "a<m>b<m>", "multimodal_data": ["x", "y"]}, "a"),
        ({"prompt_string": "a<__media__>b<m>", "multimodal_data": ["x"]}, "a<__media__>b"),
    ],
)
def test_the_text_before_a_marker(prompt: Any, before: str | None) -> None:
    """Of a completion with media."""
    assert media.before_marker(prompt, ["<other>", "<m>"]) == before


def test_a_build_that_tells_no_marker() -> None:
    """Has always the same one."""
    prompt = {"prompt_string": "a<__media__>b", "multimodal_data": ["x"]}
    assert media.before_marker(prompt, [""]) == "a"


@pytest.mark.parametrize("said", ["<m>b", "b", 5])
def test_no_text_before_a_marker(said: Any) -> None:
    """Nothing could be told of it."""
    with pytest.raises(PromptNotTokenizable):
        media.before_marker({"prompt_string": said, "multimodal_data": ["x"]}, ["<m>"])


TWO = {"<m>", "<other>"}


def plain(said: str) -> dict[str, Any]:
    return {"prompt_string": said, "multimodal_data": ["x"]}


@pytest.mark.parametrize("field", ["prompt", "content", "input"])
@pytest.mark.parametrize(
    ("markers", "own", "said", "becomes"),
    [
        (TWO, "<m>", "a<other>b", "a<m>b"),
        (TWO, "<m>", "a<m>b", "a<m>b"),
        ({"<m>", ""}, "<m>", "a<__media__>b", "a<m>b"),
        ({"<m>", ""}, "", "a<m>b<__media__>", "a<__media__>b<__media__>"),  # a build that tells none
    ],
)
def test_each_server_gets_its_own_marker(
    field: str, markers: set[str], own: str, said: str, becomes: str
) -> None:
    """Alone and in a list, of a completion and of embeddings; nothing else is changed."""
    for told, right in ((plain(said), plain(becomes)), ([said, plain(said), 5], [said, plain(becomes), 5])):
        body = {field: told, "more": said}
        before = copy.deepcopy(body)
        assert media.with_marker(body, markers, own) == {field: right, "more": said}
        assert body == before, "it is sent to another server if this one fails"


@pytest.mark.parametrize("prompt", ["a<other>b", ["a<other>b"], [1, 2], {"prompt_string": "a<other>b"}, None])
def test_a_body_without_media_stays_the_same(prompt: Any) -> None:
    """Whatever its text says, and one with media too where all servers have one marker."""
    body = {"prompt": prompt, "multimodal_data": []}
    assert media.with_marker(body, TWO, "<m>") is body
    body = {"prompt": plain("a<m>b")}
    assert media.with_marker(body, {"<m>"}, "<m>") is body


def test_media_of_another_shape_are_refused_by_the_server() -> None:
    """As they are."""
    body = {"prompt": {"prompt_string": 5, "multimodal_data": ["x"]}}
    assert media.with_marker(body, TWO, "<m>") == body
