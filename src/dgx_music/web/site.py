"""What all requests to one mounted API share."""

from __future__ import annotations

from functools import cached_property
from typing import cast

from anyio import CapacityLimiter
from starlette.requests import Request

from dgx_music.artifacts import Artifacts, open_output
from dgx_music.config import Settings, load_settings
from dgx_music.web.hub import Hub
from dgx_music.web.options import MOST_DECODES, MOST_ENCODES, WebOptions
from dgx_music.web.stops import Stops
from dgx_music.web.tokens import Rates, Tokens

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
        self.decodes = CapacityLimiter(MOST_DECODES)
        self.encodes = CapacityLimiter(MOST_ENCODES)

    @cached_property
    def artifacts(self) -> Artifacts:
        """The place of the audio; files of another place are not served."""
        settings = self._settings or load_settings()
        return open_output(settings.output, is_private=settings.is_private)


def site_of(request: Request) -> Site:
    """Return the site that the request came to."""
    return cast("Site", request.state.music_site)
