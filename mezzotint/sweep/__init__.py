"""`mezzotint bench --sweep`: the time of a call by batch size and number of threads, here or on many machines."""
