"""Stand-ins for a network and a scheduler of diffusers (torch, imported lazily)."""
