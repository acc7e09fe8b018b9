"""Several bundles of one network combined into one."""
