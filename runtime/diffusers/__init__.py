"""Stand-ins for a network and a scheduler of diffusers (torch, loaded when asked for)."""
