"""The finished file is run beside the float model before a compilation says that it is done."""
