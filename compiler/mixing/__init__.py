"""Several precisions of one network in one bundle."""
