"""Metrics and the journal of decisions. Every other package may use them; they import none of it."""
