"""What every test stands on."""

from __future__ import annotations

import os
import signal

# Megatron compiles small functions when it is imported; nothing here is compiled for a GPU.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

# A shell ignores SIGINT in what it starts in the background, nohup ignores SIGHUP, and a program keeps that for its
# children: without this, the tests of signals would fail when the suite itself runs so.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
