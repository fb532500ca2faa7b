-- Give a lock back if it is still ours, and wake those who wait for it.
-- KEYS: lock, waiters   ARGV: token, channel, message   Returns 1, or 0 when it was lost before.
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('DEL', KEYS[1])
if redis.call('DEL', KEYS[2]) == 1 then redis.call('PUBLISH', ARGV[2], ARGV[3]) end
return 1
