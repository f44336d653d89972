"""Where the first medium of a chat stands, and what comes before it."""

from __future__ import annotations

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
