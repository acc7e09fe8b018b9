"""Several bundles of one network become one."""
