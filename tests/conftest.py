"""What every test stands on."""

from __future__ import annotations

import signal

# A shell ignores SIGINT in what it starts in the background, and a program keeps that for its children: without this, the
# tests of Ctrl-C would fail when the suite itself runs in the background.
signal.signal(signal.SIGINT, signal.default_int_handler)
