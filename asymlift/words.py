"""Numbers as people say them."""


def human_seconds(seconds: float) -> str:
    """70 -> '70 s', 7_300 -> '2 h 2 min', 200_000 -> '2 d 8 h'."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if minutes < 120:
        return f"{minutes} min"
    if hours < 48:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{hours // 24} d {hours % 24} h"
