"""The two ways in which a run ends early, each with one sentence for the user."""

from __future__ import annotations


class Ending(Exception):
    """``told``: another process of the run tells the user."""

    told = False


class Wrong(Ending, ValueError):
    """What was asked for or given cannot be used. No step was made, and no file that was there was changed."""


class Failed(Ending, RuntimeError):
    """The run cannot go on. Its last checkpoint is whole."""
