"""The Redis a run stands on: choosing it, asking it, starting a private one. The standard library only."""

from sharedcluster.redis_server.address import redact
from sharedcluster.redis_server.choice import RedisChoice, choose
from sharedcluster.redis_server.interview import RedisFacts, probe
from sharedcluster.redis_server.private import PrivateRedis

__all__ = ["PrivateRedis", "RedisChoice", "RedisFacts", "choose", "probe", "redact"]
