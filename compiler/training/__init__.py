"""Parts of a quantized graph trained against the float graph: the data of a block, and the loops."""
