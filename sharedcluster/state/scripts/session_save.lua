-- Write the changed fields of one session, and nothing else of it; never bring back one that is gone.
-- KEYS: session [, its new name when the id is rotated]
-- ARGV: create 0|1, idle_ms, absolute_ms (0: none), channel, prefix of user indexes, merge 0|1, bytes of the keys that
--       stand before the names, user to bind ('': none), base version,
--       number of fields n, n * (field, base value, value), fields to remove...
-- Returns {1, version, previous version [, all fields if somebody else has written since base]}, {0} when the session
-- is gone, or {2, field, stored value, ...} when `merge` is on and a field is not what the writer saw.
local key = KEYS[1]
local exists = redis.call('HGET', key, '@v')
if not exists and ARGV[1] == '0' then return {0} end

local old_name = string.sub(key, ARGV[7] + 1)
local n = tonumber(ARGV[10])
local first, last = 11, 10 + 3 * n
if ARGV[6] == '1' then
  local conflicts = {2}
  for i = first, last, 3 do
    local stored = redis.call('HGET', key, ARGV[i]) or ''
    if stored ~= ARGV[i + 1] then
      conflicts[#conflicts + 1] = ARGV[i]
      conflicts[#conflicts + 1] = stored
    end
  end
  if #conflicts > 1 then return conflicts end
end

local t = redis.call('TIME')
local now = t[1] * 1000000 + t[2]
local now_ms = math.floor(now / 1000)
local meta = redis.call('HMGET', key, '@v', '@x', '@u')
local previous, deadline, user = meta[1] or '0', meta[2], meta[3]
-- A hybrid clock: it grows by at least one per write, and after a failover that lost writes it does not repeat
-- numbers, so that a near copy of the lost write can never pass for the new one.
local version = string.format('%.0f', math.max(tonumber(previous) + 1, now))
for i = first, last, 3 do redis.call('HSET', key, ARGV[i], ARGV[i + 2]) end
for i = last + 1, #ARGV do redis.call('HDEL', key, ARGV[i]) end
if not exists then
  redis.call('HSET', key, '@c', string.format('%.0f', now_ms))
  if ARGV[3] ~= '0' then
    deadline = string.format('%.0f', now_ms + tonumber(ARGV[3]))
    redis.call('HSET', key, '@x', deadline)
  end
end
if ARGV[8] ~= '' then
  if user and user ~= ARGV[8] then redis.call('ZREM', ARGV[5] .. user, old_name) end
  user = ARGV[8]
  redis.call('HSET', key, '@u', user)
end
redis.call('HSET', key, '@v', version)

local ttl = tonumber(ARGV[2])
if deadline then ttl = math.min(ttl, tonumber(deadline) - now_ms) end
ttl = math.max(ttl, 1)
redis.call('PEXPIRE', key, string.format('%.0f', ttl))

local reply = {1, version, previous}
if previous ~= ARGV[9] then reply[4] = redis.call('HGETALL', key) end
local name = old_name
if KEYS[2] then
  name = string.sub(KEYS[2], ARGV[7] + 1)
  redis.call('RENAME', key, KEYS[2])
  -- For a moment the old id is known to have ended: a request that was on its way with it must not begin a session of
  -- its own, whose cookie would replace the new one in the browser.
  redis.call('HSET', key, '@t', '1')
  redis.call('PEXPIRE', key, 10000)
  redis.call('PUBLISH', ARGV[4], 's - ' .. old_name)
end
if user then
  local index = ARGV[5] .. user
  if name ~= old_name then redis.call('ZREM', index, old_name) end
  redis.call('ZREMRANGEBYSCORE', index, '-inf', string.format('%.0f', now_ms))
  redis.call('ZADD', index, string.format('%.0f', now_ms + ttl), name)
  redis.call('PEXPIRE', index, string.format('%.0f', math.max(ttl, redis.call('PTTL', index))))
end
redis.call('PUBLISH', ARGV[4], 's ' .. version .. ' ' .. name)
return reply
