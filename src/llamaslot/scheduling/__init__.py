"""Decides what to do, where and when. Pure: no await, clock, path or socket; times and rates come in as arguments."""
