"""Numbers that cannot work, said by name."""

from numbers import Integral


def check_at_least(least: int, **numbers) -> None:
    """Raise a ValueError for a number that is no integer or below the least."""
    for name, number in numbers.items():
        if not isinstance(number, Integral) or isinstance(number, bool) or number < least:
            raise ValueError(f"{name} must be an integer of {least} or more, got {number!r}.")
