-- Append to a channel's history and tell every listener, under one offset.
-- KEYS: stream, meta   ARGV: data, history length, new epoch, history_ms, meta_ms, channel
-- The epoch names one life of the channel: when Redis lost it, offsets start again under another one.
-- Returns {offset, epoch}.
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
return {offset, epoch}
