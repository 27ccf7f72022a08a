"""The one exception for what a user can mend: `openlm` prints it and exits with code 2."""


class InputError(Exception):
    """Something that was given is wrong.

    The message says what was given, where, what is allowed and what to do. It is raised before
    anything is written, so that nothing is lost or overwritten by bad input.
    """
