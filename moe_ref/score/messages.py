"""What a scoring run asks of a lane and what it answers."""

import msgspec


class CaseToTry(msgspec.Struct, frozen=True):
    """A case and what its ranks are."""

    case: str
    ranks: str


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One subject on some cases. folder: first on the path, "" for none; seconds: limit of one case.

    stop: at the first case that is red, the first `unstopped` ones aside. criteria: of so many cases, that one or
    the first that pass, whether other projects would refuse it.
    """

    subject: str
    folder: str
    cases: list[CaseToTry]
    stop: bool
    unstopped: int = 0
    seconds: float = 120.0
    device: str = "cpu"
    criteria: int = 0


class Trial(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What became of one case. bits: digest of all tensors shown; refused: by name of a project, if asked for."""

    case: str
    verdict: str
    first_stage: str = ""
    message: str = ""
    bits: str = ""
    seconds: float = 0.0
    refused: dict[str, bool] = {}

    @property
    def said(self) -> str:
        """The verdict, with the stage of a mismatch."""
        return f"{self.verdict} {self.first_stage}".strip() if self.verdict == "mismatch" else self.verdict


class Done(msgspec.Struct, frozen=True, tag=True):
    """A job is over; failed: why it could not begin, or how the judge itself failed."""

    failed: str = ""
