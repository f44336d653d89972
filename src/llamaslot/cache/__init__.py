"""Prefix indexes, and how much of a common prefix a slot or snapshot can reuse. Pure: no await, clock, path or
socket.
"""
