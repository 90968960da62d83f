"""What a test fails with. Imports nothing, since the pytest plugin does."""


class Mismatch(AssertionError):
    """A case that did not pass; the text is the whole failure message."""


Mismatch.__module__ = "moe_ref"
