"""The one exception for mistakes that the user can mend."""


class UserError(Exception):
    """A mistake the user can mend.

    Its text is one clear sentence that names the file, the field and the mend; a script prints it and
    exits with status 2, without a traceback.
    """
