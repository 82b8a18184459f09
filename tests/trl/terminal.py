"""A real pseudo-terminal in place of the process's output, and the screen that it shows."""

import fcntl
import os
import pty
import re
import struct
import sys
import termios
import threading
from contextlib import contextmanager

TOKEN = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])|([\s\S])")


class Screen:
    """What a terminal shows after some output: carriage returns, line feeds and cursor movements."""

    def __init__(self):
        self.lines, self.row, self.column, self.text = [[]], 0, 0, ""

    def feed(self, text):
        self.text += text
        for arguments, command, letter in TOKEN.findall(text):
            if command:
                self._move(arguments, command)
            elif letter == "\r":
                self.column = 0
            elif letter == "\n":
                self.row, self.column = self.row + 1, 0
            else:
                self._put(letter)

    def shown(self):
        return [line for line in ("".join(line).rstrip() for line in self.lines) if line]

    def _move(self, arguments, command):
        if command == "A":
            self.row -= int(arguments or 1)
            assert self.row >= 0
        elif command == "K":
            self._line()[self.column :] = []
        else:
            # Colours move nothing; anything else is not known here and must not pass unseen.
            assert command == "m", command

    def _line(self):
        while len(self.lines) <= self.row:
            self.lines.append([])
        return self.lines[self.row]

    def _put(self, letter):
        line = self._line()
        line += " " * (self.column + 1 - len(line))
        line[self.column] = letter
        self.column += 1


@contextmanager
def terminal(monkeypatch, columns=100, rows=40):
    """Standard output and error are a terminal of this size; yields its screen, complete when the block ends."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    screen, data = Screen(), []

    def drain():
        while True:
            try:
                piece = os.read(master, 1 << 16)
            except OSError:
                return
            if not piece:
                return
            data.append(piece)

    reader = threading.Thread(target=drain, daemon=True)
    reader.start()
    stream = os.fdopen(slave, "w", buffering=1, encoding="utf-8")
    try:
        with monkeypatch.context() as patch:
            patch.setenv("TERM", "xterm-256color")
            patch.delenv("NO_COLOR", raising=False)
            patch.setattr(sys, "stdout", stream)
            patch.setattr(sys, "stderr", stream)
            yield screen
    finally:
        stream.close()
        reader.join(10)
        os.close(master)
        screen.feed(b"".join(data).decode())
