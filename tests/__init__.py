"""The tests, by tier: unit (pure), state (a real Redis), integration (real clusters), slow (storms and fuzzing)."""
