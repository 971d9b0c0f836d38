"""Grammars of the built-in tasks that are trained on."""

from manyicl.tasks.builtin.meta_training.arithmetic import GRAMMARS as ARITHMETIC
from manyicl.tasks.builtin.meta_training.classification import GRAMMARS as CLASSIFICATION
from manyicl.tasks.builtin.meta_training.large_label_sets import GRAMMARS as LARGE_LABEL_SETS
from manyicl.tasks.builtin.meta_training.nli import GRAMMARS as NLI
from manyicl.tasks.builtin.meta_training.qa import GRAMMARS as QA
from manyicl.tasks.builtin.meta_training.summarization import GRAMMARS as SUMMARIZATION

GRAMMARS = (*CLASSIFICATION, *LARGE_LABEL_SETS, *NLI, *QA, *SUMMARIZATION, *ARITHMETIC)
