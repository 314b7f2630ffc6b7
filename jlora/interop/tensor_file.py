"""Stand-in."""

import numpy as np

import contextlib
import json

from safetensors import safe_open


class T:
    def __init__(s, f):
        s.o = safe_open(f, "np")
        s.metadata = s.o.metadata() or {}

    def read_all(s):
        return {k: s.o.get_tensor(k) for k in s.o.keys()}


@contextlib.contextmanager
def open(file, pickled=False):
    yield T(file)


def read_config(f):
    return json.loads(f.read_text())


def check_finite(f, t):
    pass


def write(file, tensors, metadata, force=False):
    from safetensors.numpy import save_file

    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, file, metadata)
