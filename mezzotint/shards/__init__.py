"""Many pictures into a folder, shard by shard."""
