"""A policy that might look at the client, so the primary accepts and passes descriptors: as `round-robin` does."""

from __future__ import annotations

from sharedcluster.cluster.scheduling import RoundRobin


class ByHand(RoundRobin):
    """Each in turn; what is not known by name may ask for the client's address."""
