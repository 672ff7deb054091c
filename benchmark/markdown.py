"""Figures and tables as Markdown: how a number, an interval or a missing measure is written everywhere."""

NOT_MEASURED = "–"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table that reads as plain text too; columns of figures are right-aligned."""
    import tabulate

    tabulate.MIN_PADDING = 0  # else it widens every column by two beyond its header
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    columns = [[row[column] for row in rows] for column in range(len(head))]
    right = [place > 0 and any(map(is_figure, cells)) for place, cells in enumerate(columns)]
    sides = ["right" if flush else "left" for flush in right]
    return tabulate.tabulate(rows, head, tablefmt="pipe", colalign=sides, disable_numparse=True)


def is_figure(cell: str) -> bool:
    """Whether a cell holds a number with at most a name, not a phrase."""
    return cell[:1].isdigit() and len(cell.split()) <= 5 and ";" not in cell


def figure(number: float | None, form: str) -> str:
    return NOT_MEASURED if number is None else format(number, form)


def span(interval: list[float], form: str, scale: float = 1) -> str:
    """A 95 % interval as `low to high`."""
    return " to ".join(format(scale * end, form) for end in interval)


def ratio(speed: dict) -> str:
    return f"{speed['speed_up']:.2f}×" if "speed_up" in speed else NOT_MEASURED


def per_second(rate: float | None) -> str:
    """A rate in whole headlines a second; a slow one keeps its digits rather than become 0."""
    return figure(rate, ".0f" if rate is None or rate >= 10 else ".2g")
