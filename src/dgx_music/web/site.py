"""What all requests to one mounted API share."""

from __future__ import annotations

from functools import cached_property
from typing import cast

from anyio import CapacityLimiter
from starlette.requests import Request

from dgx_music.artifacts import Artifacts, open_output
from dgx_music.client.room import limits_of
from dgx_music.config import Settings, load_settings
from dgx_music.storage.room import QueueLimits
from dgx_music.web.hub import Hub
from dgx_music.web.options import (
    MAX_PENDING,
    MAX_PENDING_PER_TENANT,
    MOST_DECODES,
    MOST_PREVIEWS,
    WebOptions,
)
from dgx_music.web.stops import Stops
from dgx_music.web.tokens import Rates, Tokens
from dgx_music.web.transcodes import Transcodes

LOGINS_PER_MINUTE = 10.0
"""How many log-ins may be tried from each address."""


class Site:
    """One mounted API: its settings, its place for audio, and what it remembers of tokens and streams."""

    def __init__(self, settings: Settings | None, options: WebOptions) -> None:
        self._settings = settings
        self.options = options
        self.tokens = Tokens()
        self.rates = Rates(options.requests_per_second)
        self.login_rates = Rates(LOGINS_PER_MINUTE / 60, at_once=LOGINS_PER_MINUTE)
        self.stops = Stops()
        self.hub = Hub(self.stops, options.most_streams)
        self.listeners = CapacityLimiter(MOST_PREVIEWS)
        self.decodes = CapacityLimiter(MOST_DECODES)
        self.transcodes = Transcodes()

    @cached_property
    def artifacts(self) -> Artifacts:
        """The place of the audio; files of another place are not served."""
        settings = self._settings or load_settings()
        return open_output(settings.output, is_private=settings.is_private)

    @cached_property
    def queue_limits(self) -> QueueLimits:
        """How many generations may wait: as the settings say, or the web's own limits."""
        settings = self._settings or load_settings()
        total, per_tenant = settings.max_pending, settings.max_pending_per_tenant
        return limits_of(
            MAX_PENDING if total is None else total,
            MAX_PENDING_PER_TENANT if per_tenant is None else per_tenant,
        )


def site_of(request: Request) -> Site:
    """Return the site that the request came to."""
    return cast("Site", request.state.music_site)
