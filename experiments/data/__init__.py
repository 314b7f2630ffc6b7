"""Data: what needs no download here, data sets of the papers in modules of their own.

The names below are of texts that every CPython carries, of scikit-learn's digits, and of their splits and batches.
`e2e`, `triples` (WebNLG, DART), `glue`, `labelled_text`, `instructions` (GSM8K), `images` and `hub` read the papers'
data, `line_file` and `token_file` what is larger than memory; `pipeline` makes rows of tokens of it, `batches` batches.
"""

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
