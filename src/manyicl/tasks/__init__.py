"""What a task is, how it is read, and how it is checked. Loads no torch."""

from manyicl.tasks.task import Example, Task, TaskSuite

__all__ = ["Example", "Task", "TaskSuite"]
