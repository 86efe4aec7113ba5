"""The one exception that the command line turns into a sentence instead of a traceback."""


class UserError(ValueError):
    """Something outside the code is wrong (input, file, option); the message says what, and what to do."""


def check_range(
    name: str, value: float, low: float, high: float = float("inf"), *, including_low: bool = False
) -> None:
    """Raise a UserError unless low < value <= high (low <= value with `including_low`)."""
    if not (low <= value if including_low else low < value) or not value <= high:
        below = "at least" if including_low else "above"
        above = f" and at most {high:g}" if high != float("inf") else ""
        raise UserError(f"{name} must be {below} {low:g}{above}, got {value}")
