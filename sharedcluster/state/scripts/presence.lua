-- Say who is there, drop who has not been heard of, and tell who is left.
-- KEYS: deadlines (sorted set), infos (hash)
-- ARGV: what 'join' | 'leave' | 'list', ttl_ms, then for join: (member, info)*; for leave: member*
-- Returns a flat list of member, info of everybody present.
local t = redis.call('TIME')
local now = math.floor(t[1] * 1000 + t[2] / 1000)
local ttl = tonumber(ARGV[2])
if ARGV[1] == 'join' then
  for i = 3, #ARGV, 2 do
    redis.call('ZADD', KEYS[1], string.format('%.0f', now + ttl), ARGV[i])
    redis.call('HSET', KEYS[2], ARGV[i], ARGV[i + 1])
  end
  redis.call('PEXPIRE', KEYS[1], ARGV[2])
  redis.call('PEXPIRE', KEYS[2], ARGV[2])
elseif ARGV[1] == 'leave' then
  for i = 3, #ARGV do
    redis.call('ZREM', KEYS[1], ARGV[i])
    redis.call('HDEL', KEYS[2], ARGV[i])
  end
end
for _, member in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', string.format('%.0f', now))) do
  redis.call('ZREM', KEYS[1], member)
  redis.call('HDEL', KEYS[2], member)
end
if ARGV[1] ~= 'list' then return {} end
return redis.call('HGETALL', KEYS[2])
