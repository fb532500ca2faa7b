"""The applications that are measured; the same work for every peer, in that peer's usual way."""
