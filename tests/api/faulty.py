"""The operator, killed right after its first write: what a node's failure between two effects looks like.

python -m tests.api.faulty --settings ...
"""

from __future__ import annotations

import os
import sys
from typing import Any

from trimtab_operator import main
from trimtab_operator.kube import Kube

request = Kube._request


async def once(self: Kube, method: str, url: str, *arguments: Any, **named: Any) -> Any:
    """Pass the request on, and die when it has changed something."""
    before = await request(self, "GET", url) if method == "PATCH" else {}
    answer = await request(self, method, url, *arguments, **named)
    if method != "GET" and not (method == "PATCH" and version(answer) == version(before)):
        os._exit(9)
    return answer


def version(found: Any) -> Any:
    """What tells an object from what it was; None for an answer that is no object."""
    return found.get("metadata", {}).get("resourceVersion")


Kube._request = once  # type: ignore[method-assign]

if __name__ == "__main__":
    sys.exit(main.main())
