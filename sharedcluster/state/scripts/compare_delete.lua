-- Delete a key if it still holds our token.   KEYS: key   ARGV: token   Returns 1 or 0.
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('DEL', KEYS[1])
