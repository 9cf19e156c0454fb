"""Records the launches of one call and replays them for later calls with the same signature."""
