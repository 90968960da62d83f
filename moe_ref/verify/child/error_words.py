"""What an error says of itself, whatever its author did to the saying."""

import traceback

_MESSAGE_LENGTH, _TRACE_LENGTH = 4000, 16000


def error_words(error: BaseException) -> tuple[str, str]:
    """Message and traceback, cut to a length that can be shown and to characters that can be written."""
    try:
        message = str(error)
    except BaseException as other:
        message = f"no message: its __str__ raised {type(other).__name__}"
    try:
        trace = "".join(traceback.format_exception(error))
    except BaseException as other:
        trace = f"no traceback: formatting it raised {type(other).__name__}"
    # The error stands last.
    return _writable(message[:_MESSAGE_LENGTH]), _writable(trace[-_TRACE_LENGTH:])


def _writable(text: str) -> str:
    return text.encode(errors="replace").decode()
