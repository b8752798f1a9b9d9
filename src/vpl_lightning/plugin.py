"""VPL inside somebody else's CLIP-ES code base."""


class VPLPlugin:
    """Learns vision prototypes from what a host's own loop sees."""
