"""Settings that are checked as their annotations say; the faults of a whole file are in test_config.py."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pytest

from llamaslot.schema import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
)


def _even(value: int) -> int:
    if value % 2:
        raise ValueError("should be even")
    return value


def _below(path: Path, info: ValidationInfo) -> Path:
    return Path((info.context or {}).get("directory", "/"), path)


class Inner(BaseModel):
    n: int = 1


class Outer(BaseModel):
    name: Annotated[str, Field(min_length=1)]
    even: Annotated[int, BeforeValidator(lambda value: value or 2), Field(gt=0), AfterValidator(_even)] = 2
    path: Annotated[Path, AfterValidator(_below)] | None = None
    kind: Literal["a", "b"] = "a"
    inner: Inner = Inner.model_construct()
    many: tuple[Inner, ...] = ()
    by_name: dict[str, float] = Field(default_factory=dict)
    secret: SecretStr | None = None
    is_on: bool = False
    exact: Annotated[int, Field(strict=True)] = 0

    def _checked(self) -> Self:
        if self.even > 100 and self.is_on:
            raise ValueError("not both")
        return self


def kinds(**values: Any) -> list[tuple[str, str]]:
    """Where a fault is, and what it is."""
    with pytest.raises(ValidationError) as caught:
        Outer(**({"name": "x"} | values))
    return [(".".join(map(str, its.loc)), its.why or its.kind) for its in caught.value.faults]


def test_values_are_those_of_their_types() -> None:
    raw = {
        "name": "x", "even": "4", "path": "p", "inner": {"n": 2.0}, "many": [{}, {"n": "3"}],
        "by_name": {"a": 1}, "secret": "s", "is_on": "yes",
    }  # fmt: skip
    made = Outer.model_validate(raw, context={"directory": "/d"})
    assert (made.even, made.path, made.inner.n) == (4, Path("/d/p"), 2)
    assert (made.many, made.by_name, made.is_on) == ((Inner(), Inner(n=3)), {"a": 1.0}, True)
    assert made.secret is not None
    assert made.secret.get_secret_value() == "s"
    assert "'s'" not in repr(made)
    assert type(made.by_name["a"]) is float


def test_what_is_left_out_is_the_default_and_is_known_to_be() -> None:
    """A default that is made is another one each time."""
    made = Outer(name="x", kind="b")
    assert (made.even, made.kind, made.many) == (2, "b", ())
    assert made.model_fields_set == {"name", "kind"}
    assert made.by_name is not Outer(name="x").by_name


def test_all_faults_are_told_in_the_order_of_the_fields() -> None:
    assert kinds(exact=True, kind="c", even=3, many=[{"n": "x"}, 1], zebra=1, name="") == [
        ("name", "too_short"),
        ("even", "should be even"),
        ("kind", "literal_error"),
        ("many.0.n", "int_parsing"),
        ("many.1", "model_type"),
        ("exact", "int_type"),
        ("zebra", "extra_forbidden"),
    ]


@pytest.mark.parametrize(
    ("values", "where", "why"),
    [
        ({"even": 0.5}, "even", "int_from_float"),
        ({"even": "1.5"}, "even", "int_parsing"),
        ({"even": -2}, "even", "greater_than"),
        ({"path": 5}, "path", "path_type"),
        ({"by_name": {"a": "x"}}, "by_name.a", "float_parsing"),
        ({"by_name": {"a": []}}, "by_name.a", "float_type"),
        ({"by_name": {1: 1}}, "by_name.1.[key]", "string_type"),
        ({"by_name": []}, "by_name", "dict_type"),
        ({"many": {}}, "many", "tuple_type"),
        ({"is_on": 2}, "is_on", "bool_parsing"),
        ({"is_on": []}, "is_on", "bool_type"),
        ({"secret": 1}, "secret", "string_type"),
        ({"kind": []}, "kind", "literal_error"),
        ({"even": 102, "is_on": True}, "", "not both"),
    ],
)
def test_a_fault_has_its_place(values: dict[str, Any], where: str, why: str) -> None:
    assert kinds(**values) == [(where, why)]


def test_a_copy_has_other_values_and_the_first_stays() -> None:
    made = Outer(name="x")
    other = made.model_copy(update={"even": 8})
    assert (made.even, other.even, other.name) == (2, 8, "x")
    assert other.model_fields_set == {"name", "even"}
    assert other != made
    assert made == Outer(name="x")
    assert hash(Inner(n=2)) == hash(Inner(n=2))


def test_what_has_no_fault_is_taken_as_it_is() -> None:
    """An object of the class is not checked again."""
    inner = Inner.model_construct(n=7)
    assert Outer(name="x", inner=inner).inner is inner
