"""How many descriptors this process and what it forks may have open.

The usual soft limit is 1,024, which is for programs that use select(2); a worker that holds that many connections
would refuse the next one. Programs that need more are meant to raise it themselves, up to the hard one, as Node does.
"""

from __future__ import annotations

import resource
from contextlib import suppress
from typing import Final

MOST: Final = 1 << 20
"""Where a container's hard limit is a thousand million, programs that close every possible descriptor would take
minutes; nobody here needs more than this."""


def raise_limit() -> int:
    """Raise the soft limit to the hard one, but not above `MOST`; never lowers it.

    Returns:
        The limit that holds from now on, here and in what is started from here.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST if hard == resource.RLIM_INFINITY else min(hard, MOST)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):  # a kernel whose fs.nr_open is below the hard limit: as it was
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
