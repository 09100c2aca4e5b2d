"""The web: the library's API over HTTP, alone or mounted into another FastAPI application.

Importing this package imports FastAPI, which comes with the extra ``web``.
"""

from dgx_music.roles import Role
from dgx_music.web.access import Access
from dgx_music.web.app import create_app, music_lifespan, music_router
from dgx_music.web.options import WebOptions

__all__ = ["Access", "Role", "WebOptions", "create_app", "music_lifespan", "music_router"]
