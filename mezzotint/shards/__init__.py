"""Many images in a folder, drawn and stored shard by shard."""
