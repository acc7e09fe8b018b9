"""The kernels that an engine builds of a file, and the reasons why a group has no integer kernel."""
