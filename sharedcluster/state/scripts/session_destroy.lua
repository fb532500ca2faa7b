-- End sessions at once, for every worker.
-- KEYS: sessions   ARGV: channel, prefix of user indexes, name of each session
-- Returns how many there were.
local count = 0
for i, key in ipairs(KEYS) do
  local name = ARGV[2 + i]
  local user = redis.call('HGET', key, '@u')
  if user then redis.call('ZREM', ARGV[2] .. user, name) end
  count = count + redis.call('DEL', key)
  redis.call('PUBLISH', ARGV[1], 's - ' .. name)
end
return count
