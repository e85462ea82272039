"""Text that comes in pieces, broken between words at the edge of a terminal.

A word is written as it comes; one that turns out too long for its line is wiped out and begins the next. So
nothing waits for the end of a word. Knows columns; not styles, nor what the text says.
"""

from rich.cells import cell_len

_FENCE = "```"


class Lines:
    """`feed` gives back what to write. Code in a block is left alone, so that it can be copied."""

    def __init__(self) -> None:
        self._line = ""
        self._word = ""
        self._code = False

    def feed(self, text: str, *, columns: int) -> str:
        """What makes a terminal of so many columns show `text` behind what was fed before."""
        return "".join(self._take(char, columns - 1) for char in text)  # in the last column a cursor may hang

    def _take(self, char: str, columns: int) -> str:
        if char == "\n":
            self._code ^= self._line.lstrip().startswith(_FENCE)
            self._line = self._word = ""
            return char
        ends_word = char in " \t" or cell_len(char) > 1  # a wide one needs no space beside it
        begun = "" if ends_word else self._word
        self._line, self._word = self._line + char, "" if ends_word else begun + char
        if self._code or cell_len(self._line) <= columns:
            return char
        if char == " ":
            return ""  # what comes next begins a line
        indented = self._line.lstrip()
        if len(begun) + 1 >= len(indented) or indented.startswith(_FENCE):
            return char
        self._line = begun + char
        wipe = f"\x1b[{cell_len(begun)}D\x1b[K" if begun else ""
        return f"{wipe}\n{self._line}"
