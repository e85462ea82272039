"""Checks of plain values that a user passes. Each returns the value or raises."""

from .errors import PromptError, SamplingError


def whole_number(name: str, value: object, *, least: int) -> int:
    """`value` if it is an int of at least `least`; a bool does not count as one."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise SamplingError(f"{name} is a whole number, {least} or more; found {value!r}")
    return value


def check_text(text: object, where: str, *, may_be_blank: bool = False) -> str:
    """`text` if it is a string that is not blank and that UTF-8 can encode."""
    if not isinstance(text, str):
        raise PromptError(f"Expected {where} to be text, found a {type(text).__name__}. Pass a string.")
    if not (text.strip() or may_be_blank):
        raise PromptError(f"Expected {where} to say something, found {text!r}. Leave it out or fill it.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = f"the lone surrogate {text[error.start]!r} at character {error.start}"
        raise PromptError(
            f"Expected {where} to be Unicode, found {found}. Check the encoding of its source."
        ) from None
    return text
