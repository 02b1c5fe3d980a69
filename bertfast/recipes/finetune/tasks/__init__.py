"""The tasks by their names."""

from .base import Task
from .classify import Classify, Pair
from .qa import Answers
from .tag import Tag

TASKS: dict[str, type[Task]] = {task.name: task for task in (Classify, Tag, Answers, Pair)}
