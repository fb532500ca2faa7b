-- Take a lock, or leave word that somebody waits for it.
-- KEYS: lock, fence, waiters   ARGV: token, ttl_ms, wait 0|1
-- The fence grows with every holder, also over a loss of Redis's data: whoever is asked to act for a holder refuses a
-- fence lower than one it has seen. Returns {1, fence}, or {0, pttl}.
if redis.call('SET', KEYS[1], ARGV[1], 'NX', 'PX', ARGV[2]) then
  local t = redis.call('TIME')
  local fence = math.max(tonumber(redis.call('GET', KEYS[2]) or '0') + 1, t[1] * 1000000 + t[2])
  fence = string.format('%.0f', fence)
  redis.call('SET', KEYS[2], fence)
  return {1, fence}
end
if redis.call('GET', KEYS[1]) == ARGV[1] then return {1, redis.call('GET', KEYS[2])} end -- ours, sent a second time
if ARGV[3] == '1' then redis.call('SET', KEYS[3], '1', 'PX', 60000) end
return {0, redis.call('PTTL', KEYS[1])}
