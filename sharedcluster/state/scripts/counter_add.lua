-- Add to a counter, at most once per token.   KEYS: counter, token   ARGV: amount, ttl_ms of the token
-- Returns the counter's value.
if not redis.call('SET', KEYS[2], '1', 'NX', 'PX', ARGV[2]) then return tonumber(redis.call('GET', KEYS[1]) or '0') end
return redis.call('INCRBY', KEYS[1], ARGV[1])
