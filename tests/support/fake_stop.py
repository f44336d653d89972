"""Which text of an answer is sent with each token: all but what may yet become a stop word (measured on the real
server).
"""

from __future__ import annotations

from tests.support.fake_model import FakeModel
from tests.support.fake_types import Task


def told(task: Task, model: FakeModel) -> tuple[str, str | None]:
    """Return the text that is sent with the token just sampled, perhaps none, and the stop word that it completes, if
    any.
    """
    if not task.stop:
        return text_of(task.generated[-1:], model), None
    text = text_of(task.generated, model)
    word = next((word for word in task.stop if word in text), None)
    if word is not None:
        text = text.partition(word)[0]
    elif task.generated[-1] < 256 and any(_may_become(word, text[task.n_told :]) for word in task.stop):
        return "", None
    piece, task.n_told = text[task.n_told :], max(len(text), task.n_told)
    return piece, word


def text_of(ids: list[int], model: FakeModel) -> str:
    """The text of tokens. Special tokens have none."""
    return model.detokenize([i for i in ids if i < 256])


def _may_become(word: str, text: str) -> bool:
    return any(text.endswith(word[:n]) for n in range(1, len(word)))
