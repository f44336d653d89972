"""``llamaslot monitoring``: files for Prometheus and Grafana, printed."""

from __future__ import annotations

import click

_FILES = {
    "dashboard": "grafana-dashboard.json",
    "alerts": "prometheus-alerts.yaml",
    "scrape": "prometheus-scrape.yaml",
}


@click.command()
@click.argument("what", type=click.Choice(list(_FILES)))
def monitoring(what: str) -> None:
    """Print a file for monitoring: Grafana's dashboard, Prometheus' alert
    rules, or the lines with which Prometheus reads llamaslot's metrics.
    """
    from importlib.resources import files

    click.echo((files("llamaslot") / "data" / _FILES[what]).read_text(), nl=False)
