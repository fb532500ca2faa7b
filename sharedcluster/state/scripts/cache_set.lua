-- Store a value and tell every worker. With a lease, only while that lease is ours: a deletion takes it away, so a
-- value computed from what was there before the deletion is refused.
-- KEYS: value, lease   ARGV: lease token ('': unconditional), line of tag versions (with a lease), rest of the value,
--                            ttl_ms (0: no end), channel, message, only if missing 0|1, prefix of tags,
--                            new tag version, tags (without a lease)...
-- Returns 1, or 0 when it was refused.
if ARGV[1] ~= '' and redis.call('GET', KEYS[2]) ~= ARGV[1] then return 0 end
local head = ARGV[2]
if ARGV[1] == '' then
  local words = {}
  for i = 10, #ARGV do
    local key = ARGV[8] .. ARGV[i]
    redis.call('SET', key, ARGV[9], 'NX')
    words[#words + 1] = ARGV[i] .. '=' .. redis.call('GET', key)
  end
  head = table.concat(words, ' ')
end
if ARGV[7] == '1' then
  local old = redis.call('GET', KEYS[1])
  local valid = old
  for tag, version in string.gmatch(old and string.match(old, '^([^\n]*)\n') or '', '(%S+)=(%S+)') do
    if redis.call('GET', ARGV[8] .. tag) ~= version then valid = false end
  end
  if valid then return 0 end
end
local value = head .. '\n' .. ARGV[3]
if ARGV[4] == '0' then redis.call('SET', KEYS[1], value) else redis.call('SET', KEYS[1], value, 'PX', ARGV[4]) end
redis.call('DEL', KEYS[2])
redis.call('PUBLISH', ARGV[5], ARGV[6])
return 1
