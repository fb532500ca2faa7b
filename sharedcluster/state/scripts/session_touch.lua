-- Keep a session alive for another idle period, but not beyond its absolute deadline.
-- KEYS: session   ARGV: idle_ms, prefix of user indexes, name   Returns 1, or 0 when it is gone.
local meta = redis.call('HMGET', KEYS[1], '@v', '@x', '@u')
if not meta[1] then return 0 end
local t = redis.call('TIME')
local now_ms = math.floor(t[1] * 1000 + t[2] / 1000)
local ttl = tonumber(ARGV[1])
if meta[2] then ttl = math.min(ttl, tonumber(meta[2]) - now_ms) end
ttl = math.max(ttl, 1)
if meta[3] then
  local index = ARGV[2] .. meta[3]
  redis.call('ZADD', index, string.format('%.0f', now_ms + ttl), ARGV[3])
  redis.call('PEXPIRE', index, string.format('%.0f', math.max(ttl, redis.call('PTTL', index))))
end
return redis.call('PEXPIRE', KEYS[1], string.format('%.0f', ttl))
