"""The one exception for mistakes that a user can mend."""


class UserError(ValueError):
    """A mistake outside the program: a bad key, a missing shard, a wrong world size.

    The message is one line: what is wrong, where, and what to do. The `modsquad` command prints it alone and exits
    with status 2; anything else is a fault of ours and shows a traceback.
    """
