"""Texts that every CPython carries, split by file, and their batches."""

from experiments.data.text import Corpus as Corpus
from experiments.data.text import Document as Document
from experiments.data.text import python_docs as python_docs
from experiments.data.text import python_source as python_source
from experiments.data.windows import Windows as Windows
from experiments.data.windows import spread as spread
