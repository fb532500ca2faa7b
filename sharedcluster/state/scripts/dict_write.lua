-- Change fields of a shared dict, all or none.
-- KEYS: dict   ARGV: channel, name, base version, n, n * (kind, field, expected, value)
-- Kinds: set; del; new: only if missing; cas: only if the stored value is `expected`.
-- Returns {1, version, previous version}, or {0, index of the operation that did not apply, stored value or false}.
local n = tonumber(ARGV[4])
for i = 1, n do
  local at = 4 * i + 1
  local kind, field = ARGV[at], ARGV[at + 1]
  if kind == 'new' or kind == 'cas' then
    local stored = redis.call('HGET', KEYS[1], field)
    if (kind == 'new' and stored) or (kind == 'cas' and stored ~= ARGV[at + 2]) then return {0, i, stored} end
  end
end
for i = 1, n do
  local at = 4 * i + 1
  if ARGV[at] == 'del' then
    redis.call('HDEL', KEYS[1], ARGV[at + 1])
  else
    redis.call('HSET', KEYS[1], ARGV[at + 1], ARGV[at + 3])
  end
end
local t = redis.call('TIME')
local previous = redis.call('HGET', KEYS[1], '@v') or '0'
local version = string.format('%.0f', math.max(tonumber(previous) + 1, t[1] * 1000000 + t[2]))
redis.call('HSET', KEYS[1], '@v', version)
redis.call('PUBLISH', ARGV[1], 'd ' .. version .. ' ' .. ARGV[2])
return {1, version, previous}
