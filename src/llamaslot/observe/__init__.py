"""Metrics and the journal of decisions; open to every room, importing none of them."""
