-- Write the changed fields of sessions, and nothing else of them; never bring back one that is gone.
-- Saves of several requests run together, each for itself: what fails in one is that one's answer and nobody else's.
-- KEYS: of each save the session [, its new name when the id is rotated]
-- ARGV: absolute_ms (0: none), channel, prefix of user indexes, bytes of the keys that stand before the names; then of
--       each save: how (c: creates, m: merges, r: rotates), idle_ms, user to bind ('': none), base version, number of
--       fields n, number of fields to remove, n * (field, value), with m n * base value, fields to remove...
-- Returns of each save: its version; {1, version, all fields} if somebody else has written since base; {0} when the
-- session is gone; {2, field, stored value, ...} when it merges and a field is not what the writer saw; or an error.
local absolute_ms, channel, users, skip = tonumber(ARGV[1]), ARGV[2], ARGV[3], ARGV[4] + 1
local t = redis.call('TIME')
local now = t[1] * 1000000 + t[2]
local now_ms = math.floor(now / 1000)
local news, answers = {}, {}

local function whole(number) return string.format('%.0f', number) end
local function name_of(key) return string.sub(key, skip) end
local function tell(mark, key) news[#news + 1] = mark .. ' ' .. name_of(key) end

local function conflicts_of(key, first, n)
  local conflicts = {2}
  for i = 0, n - 1 do
    local field = ARGV[first + 2 * i]
    local stored = redis.call('HGET', key, field) or ''
    if stored ~= ARGV[first + 2 * n + i] then
      conflicts[#conflicts + 1] = field
      conflicts[#conflicts + 1] = stored
    end
  end
  return #conflicts > 1 and conflicts
end

local function save(key, new_key, at, n, removed)
  local creates, merges = string.find(ARGV[at], 'c', 1, true), string.find(ARGV[at], 'm', 1, true)
  local meta = redis.call('HMGET', key, '@v', '@x', '@u')
  local previous, deadline, user = meta[1], meta[2], meta[3]
  if not previous and not creates then return {0} end
  local first = at + 6
  if merges then
    local conflicts = conflicts_of(key, first, n)
    if conflicts then return conflicts end
  end

  -- A hybrid clock: it grows by at least one per write, and after a failover that lost writes it does not repeat
  -- numbers, so that a near copy of the lost write can never pass for the new one.
  local version = whole(math.max(tonumber(previous or '0') + 1, now))
  local stop = first + 2 * n - 1
  redis.call('HSET', key, '@v', version, unpack(ARGV, first, math.min(first + 999, stop)))
  for i = first + 1000, stop, 1000 do redis.call('HSET', key, unpack(ARGV, i, math.min(i + 999, stop))) end
  local last = stop + (merges and n or 0)
  for i = last + 1, last + removed do redis.call('HDEL', key, ARGV[i]) end
  if not previous then
    redis.call('HSET', key, '@c', whole(now_ms))
    if absolute_ms > 0 then
      deadline = whole(now_ms + absolute_ms)
      redis.call('HSET', key, '@x', deadline)
    end
  end
  if ARGV[at + 2] ~= '' then
    if user and user ~= ARGV[at + 2] then redis.call('ZREM', users .. user, name_of(key)) end
    user = ARGV[at + 2]
    redis.call('HSET', key, '@u', user)
  end

  local ttl = tonumber(ARGV[at + 1])
  if deadline then ttl = math.min(ttl, tonumber(deadline) - now_ms) end
  ttl = math.max(ttl, 1)
  redis.call('PEXPIRE', key, whole(ttl))

  local answer = version
  if (previous or '0') ~= ARGV[at + 3] then answer = {1, version, redis.call('HGETALL', key)} end
  local kept = new_key or key
  if new_key then
    redis.call('RENAME', key, new_key)
    -- For a moment the old id is known to have ended: a request that was on its way with it must not begin a session
    -- of its own, whose cookie would replace the new one in the browser.
    redis.call('HSET', key, '@t', '1')
    redis.call('PEXPIRE', key, 10000)
    tell('-', key)
  end
  if user then
    local index = users .. user
    if new_key then redis.call('ZREM', index, name_of(key)) end
    redis.call('ZREMRANGEBYSCORE', index, '-inf', whole(now_ms))
    redis.call('ZADD', index, whole(now_ms + ttl), name_of(kept))
    redis.call('PEXPIRE', index, whole(math.max(ttl, redis.call('PTTL', index))))
  end
  tell(version, kept)
  return answer
end

local k, at = 1, 5
while at <= #ARGV do
  local key, how = KEYS[k], ARGV[at]
  local new_key = string.find(how, 'r', 1, true) and KEYS[k + 1]
  local n, removed = tonumber(ARGV[at + 4]), tonumber(ARGV[at + 5])
  local done, answer = pcall(save, key, new_key or nil, at, n, removed)
  if not done then
    -- It may have written a part: nobody may go on believing a copy.
    tell('-', key)
    local text = type(answer) == 'table' and answer.err or tostring(answer)
    answer = {err = string.match(text, '%u%u+ .*') or ('ERR ' .. text)}
  end
  answers[#answers + 1] = answer
  k = k + (new_key and 2 or 1)
  at = at + 6 + (string.find(how, 'm', 1, true) and 3 or 2) * n + removed
end
if #news > 0 then redis.call('PUBLISH', channel, 's ' .. table.concat(news, ' ')) end
return answers
