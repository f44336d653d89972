"""Whose a request is, as every handler may ask; found out before anything else is done with it."""

from __future__ import annotations

from aiohttp import web

from llamaslot.core.users import NOBODY, User

USER = web.RequestKey("user", User)


def user_of(request: web.Request) -> User:
    user: User = request.get(USER, NOBODY)
    return user
