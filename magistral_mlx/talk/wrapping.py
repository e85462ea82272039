"""Word wrapping of streamed text at the edge of a terminal.

A word is written as it comes; one that turns out too long for its line is erased and moved to the next. So
nothing waits for the end of a word. Knows columns; not styles, nor what the text says.
"""

from rich.cells import cell_len

_FENCE = "```"


class Lines:
    """`feed` returns what to write. Fenced code is not wrapped, so that it can be copied."""

    def __init__(self) -> None:
        self._line = ""
        self._word = ""
        self._code = False

    def feed(self, text: str, *, columns: int) -> str:
        """What to write so that a terminal of so many columns shows `text` after what was fed before."""
        # One column less: after the last one, terminals differ in where the cursor is.
        return "".join(self._take(char, columns - 1) for char in text)

    def _take(self, char: str, columns: int) -> str:
        if char == "\n":
            self._code ^= self._line.lstrip().startswith(_FENCE)
            self._line = self._word = ""
            return char
        ends_word = char in " \t" or cell_len(char) > 1  # a line may break at any wide character
        begun = "" if ends_word else self._word
        self._line, self._word = self._line + char, "" if ends_word else begun + char
        if self._code or cell_len(self._line) <= columns:
            return char
        if char == " ":
            return ""  # the next word begins a line
        indented = self._line.lstrip()
        if len(begun) + 1 >= len(indented) or indented.startswith(_FENCE):
            return char
        self._line = begun + char
        wipe = f"\x1b[{cell_len(begun)}D\x1b[K" if begun else ""
        return f"{wipe}\n{self._line}"
