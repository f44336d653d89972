"""What is counted, and its text: prometheus_client reads it, and would write the same."""

from __future__ import annotations

import prometheus_client
import pytest
from prometheus_client.parser import text_string_to_metric_families

from llamaslot.observe.counting import SECONDS, Counter, Family, Gauge, Histogram, M

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def lines(family: Family[M]) -> str:
    return "".join(f"{line}\n" for line in family.lines())


def samples(text: str) -> Samples:
    """All but the moments of creation."""
    families = text_string_to_metric_families(text)
    return {
        (its.name, tuple(sorted(its.labels.items()))): its.value
        for family in families
        for its in family.samples
        if not its.name.endswith("_created")
    }


def test_the_text_is_that_of_prometheus_client() -> None:
    """With names of all kinds of types, labels that need an escape, and large numbers."""
    registry, text, names = (
        prometheus_client.CollectorRegistry(),
        "What it counts: 1,000",
        ("backend", "model"),
    )
    odd = 'a "b"\\ \n, c'
    counter, counter_ = (
        Family(Counter, "x", text, names),
        prometheus_client.Counter("x", text, names, registry=registry),
    )
    gauge, gauge_ = Family(Gauge, "y", text, ()), prometheus_client.Gauge("y", text, registry=registry)
    histogram = Family(Histogram, "z", text, ("kind",))
    histogram_ = prometheus_client.Histogram("z", text, ("kind",), registry=registry, buckets=SECONDS)
    for each in (counter, counter_):
        each.labels("gpu0", odd).inc()
        each.labels("gpu0", odd).inc(1e9 + 0.5)
        each.labels("gpu1", "").inc(0)
    for one in (gauge.labels(), gauge_):
        one.set(3)
    for its in (histogram, histogram_):
        for seconds in (0.0, 0.01, 0.011, 5, 300.0, 301.0):
            its.labels("k").observe(seconds)
    told = lines(counter) + lines(gauge) + lines(histogram)
    theirs = prometheus_client.generate_latest(registry).decode()
    assert samples(told) == samples(theirs)
    assert told.replace("_total ", " ").count("# TYPE") == theirs.count("# TYPE")


def test_a_family_without_measures_has_its_head() -> None:
    assert lines(Family(Counter, "x", "Text", ("a",))) == "# HELP x_total Text\n# TYPE x_total counter\n"


def test_a_removed_measure_is_told_no_more() -> None:
    family = Family(Counter, "x", "Text", ("a",))
    family.labels("b").inc()
    family.remove("b")
    family.remove("b")
    assert samples(lines(family)) == {}
    assert family.labels("b").value == 0


def test_a_counter_only_grows() -> None:
    with pytest.raises(ValueError, match="only grows"):
        Counter().inc(-1)
