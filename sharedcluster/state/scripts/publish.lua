-- Append to a channel's history and tell every listener, under one offset.
-- KEYS: stream, meta, once   ARGV: data, history length, new epoch, history_ms, meta_ms, channel, once 0|1
-- With `once` a second call with the same key returns the position of the first and sends nothing.
-- The epoch names one life of the channel: when Redis lost it, offsets start again under another one.
-- Returns {offset, epoch}.
if ARGV[7] == '1' then
  local first = redis.call('GET', KEYS[3])
  if first then
    local offset, epoch = string.match(first, '^(%d+) (.+)$')
    return {tonumber(offset), epoch}
  end
end
local epoch = redis.call('HGET', KEYS[2], 'e')
if not epoch then
  epoch = ARGV[3]
  redis.call('HSET', KEYS[2], 'e', epoch)
  redis.call('DEL', KEYS[1])
end
local offset = redis.call('HINCRBY', KEYS[2], 'o', 1)
redis.call('XADD', KEYS[1], 'MAXLEN', ARGV[2], offset .. '-0', 'd', ARGV[1])
redis.call('PEXPIRE', KEYS[1], ARGV[4])
redis.call('PEXPIRE', KEYS[2], ARGV[5])
redis.call('PUBLISH', ARGV[6], offset .. ' ' .. epoch .. ' ' .. ARGV[1])
if ARGV[7] == '1' then redis.call('SET', KEYS[3], offset .. ' ' .. epoch, 'PX', ARGV[4]) end
return {offset, epoch}
