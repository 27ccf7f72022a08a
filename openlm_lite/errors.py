"""Exceptions whose message is all that the user needs: `openlm` prints it without a traceback."""


class InputError(Exception):
    """Something that was given is wrong; exit code 2.

    The message says what was given, where, what is allowed and what to do. It is raised before
    anything is written, so that nothing is lost or overwritten by bad input.
    """


class RelayedError(InputError):
    """Another rank met an InputError, and reports it: this rank only has to stop."""


class RunError(Exception):
    """A run cannot go on, through no fault of its input: disk full, loss not finite. Exit code 1.

    The message says what happened and what to do; what was saved before is whole.
    """


class SharedError(RunError):
    """A RunError that every rank raises alike: rank 0 reports it."""
