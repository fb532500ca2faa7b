-- End sessions at once, for every worker.
-- KEYS: sessions   ARGV: channel, prefix of user indexes, tombstone_ms (0: none), name of each session
-- With a tombstone the ids are known for a while to have ended, see session_save.lua. Returns how many there were.
local count, news = 0, {}
for i, key in ipairs(KEYS) do
  local name = ARGV[3 + i]
  local meta = redis.call('HMGET', key, '@v', '@u')
  if meta[2] then redis.call('ZREM', ARGV[2] .. meta[2], name) end
  if meta[1] then count = count + 1 end
  redis.call('DEL', key)
  if ARGV[3] ~= '0' then
    redis.call('HSET', key, '@t', '1')
    redis.call('PEXPIRE', key, ARGV[3])
  end
  news[i] = '- ' .. name
end
redis.call('PUBLISH', ARGV[1], 's ' .. table.concat(news, ' '))
return count
