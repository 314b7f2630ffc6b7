"""What needs no download: texts that every CPython carries, and scikit-learn's digits; splits and batches of both."""

from experiments.data.digits import Digits as Digits
from experiments.data.digits import Labelled as Labelled
from experiments.data.digits import Shuffled as Shuffled
from experiments.data.digits import turned_digits as turned_digits
from experiments.data.digits import upright_digits as upright_digits
from experiments.data.text import Corpus as Corpus
from experiments.data.text import Document as Document
from experiments.data.text import python_docs as python_docs
from experiments.data.text import python_source as python_source
from experiments.data.windows import Windows as Windows
from experiments.data.windows import spread as spread
