"""Who is asking: a signed-in user, or a browser that keeps a token nobody else knows."""

import re
import secrets

import gradio as gr

from bapo.adapters import AdapterStore
from bapo.errors import BapoError
from bapo.jobs.service import Jobs, owner_of
from bapo.settings import HUGGING_FACE

STORAGE_KEY = "bapo-visitor"


class Visitors:
    """Tells owners apart. A signed-in user is the same on every device, a token's owner is its browser.

    `sign_in` of the settings is empty (tokens), `HUGGING_FACE`, or a list of users with passwords, whom
    gradio has let in before any event gets here.
    """

    def __init__(self, jobs: Jobs):
        self.jobs = jobs
        self.sign_in = jobs.settings.sign_in

    @staticmethod
    def new_token() -> str:
        return secrets.token_urlsafe(24)

    def adapters(self, token: str | None, request: gr.Request | None) -> AdapterStore:
        """Everyone's adapters, and the visitor's own where the visitor is known."""
        try:
            return self.jobs.adapters_of(self.owner(token, request))
        except BapoError:
            return self.jobs.shared

    def owner(self, token: str | None, request: gr.Request | None) -> str:
        """The owner behind an event; a `BapoError` where nobody can be named."""
        user = self.user(request)
        if user:
            return owner_of(f"user {user}")
        if self.sign_in:
            raise BapoError("Sign in first: adapters and jobs of your own need a name here.")
        if not token or not re.fullmatch(r"[\w-]{24,64}", token):
            raise BapoError("This page does not know you yet. Reload it.")
        return owner_of(f"token {token}")

    def user(self, request: gr.Request | None) -> str | None:
        """The name under which somebody has signed in."""
        if self.sign_in == HUGGING_FACE:
            scope = getattr(getattr(request, "request", None), "scope", {})
            profile = (scope.get("session") or {}).get("oauth_info", {}).get("userinfo", {})
            return profile.get("preferred_username")
        return getattr(request, "username", None) if self.sign_in else None
