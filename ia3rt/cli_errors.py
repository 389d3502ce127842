"""What a user of the command line can mend."""


class MissingPackageError(RuntimeError):
    """A package is not installed; the message says how to install it."""


class UsageError(ValueError):
    """An option's value is of no use.

    Attributes:
        option: the option, as the user writes it.
    """

    def __init__(self, option: str, message: str) -> None:
        super().__init__(message)
        self.option = option
