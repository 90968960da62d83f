"""What could not be read of the records, and is in no other section."""

from typing import TYPE_CHECKING

from moe_ref.report.sections.view import View, fill
from moe_ref.report.words import refused_words

if TYPE_CHECKING:
    from markupsafe import Markup

_SHOWN = 200


def refused_section(view: View) -> "Markup":
    """File, line and reason; empty where all was read."""
    refused = view.evidence.run.refused
    return fill("sections/refused.html.j2", refused=refused[:_SHOWN], words=refused_words(refused),
                left=sum(one.number for one in refused[_SHOWN:]))
