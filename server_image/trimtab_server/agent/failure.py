"""Why a base or an adapter is not served: a documented reason, a sentence, and whether it may pass by itself."""

from __future__ import annotations

from trimtab_api.conditions import Reason


class Unservable(Exception):
    """This input cannot be served now.

    `transient` says that time alone may mend it: it is then tried again soon, else only slowly.
    """

    def __init__(self, reason: Reason, message: str, *, transient: bool = False) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.transient = transient
