"""Scores as the papers report them: of generated texts, of classes and values, of answers to sums, of pictures."""

from experiments.metrics.answers import exact_match as exact_match
from experiments.metrics.classification import accuracy as accuracy
from experiments.metrics.classification import f1 as f1
from experiments.metrics.classification import glue as glue
from experiments.metrics.classification import macro_f1 as macro_f1
from experiments.metrics.classification import matthews as matthews
from experiments.metrics.classification import pearson as pearson
from experiments.metrics.classification import spearman as spearman
from experiments.metrics.generation import e2e as e2e
from experiments.metrics.generation import triples as triples
from experiments.metrics.meteor import meteor as meteor
from experiments.metrics.meteor import meteor_nltk as meteor_nltk
from experiments.metrics.ngrams import bleu as bleu
from experiments.metrics.ngrams import nist as nist
from experiments.metrics.overlap import cider as cider
from experiments.metrics.overlap import rouge_l as rouge_l
from experiments.metrics.pictures import agreement as agreement
from experiments.metrics.pictures import diversity as diversity
from experiments.metrics.pictures import likeness as likeness
from experiments.metrics.pictures import spread as spread
