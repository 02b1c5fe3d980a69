"""The part of the rows that is held out from training, by scikit-learn."""

from collections import Counter
from collections.abc import Sequence

from ...commands.errors import UserError
from .tables import Row
from .tasks import Task


def held_out(
    rows: Sequence[Row], task: Task, share: float, seed: int
) -> tuple[list[Row], list[Row]]:
    """Training rows and held-out ones, each in their order. A label with one row stays in training;
    rows of one group (questions about one context) stay together."""
    from sklearn.model_selection import GroupShuffleSplit, train_test_split

    groups = [task.group(row.example) for row in rows]
    if any(group is not None for group in groups):
        if len(set(groups)) < 2:
            raise UserError("all rows share one context: give --validation")
        splitter = GroupShuffleSplit(1, test_size=share, random_state=seed)
        ((train, held),) = splitter.split(range(len(rows)), groups=groups)
    else:
        strata = [task.stratum(row.example) for row in rows]
        counts = Counter(strata)
        split = [place for place in range(len(rows)) if counts[strata[place]] > 1]
        labels = [strata[place] for place in split]
        least = max(2, len(set(labels)))
        size = max(round(share * len(split)), len(set(labels)))
        if len(split) < 2 * least or size > len(split) - len(set(labels)):
            raise UserError(
                f"{len(rows)} rows with {len(counts)} labels are too few to hold some out: give "
                "--validation"
            )
        train, held = train_test_split(
            split, test_size=size, random_state=seed, stratify=labels if len(counts) > 1 else None
        )
        train = [*train, *(place for place in range(len(rows)) if counts[strata[place]] == 1)]
    return [rows[place] for place in sorted(train)], [rows[place] for place in sorted(held)]
