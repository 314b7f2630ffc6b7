"""The Java programs of the COCO scorer, which pycocoevalcap brings along: METEOR 1.5 and Stanford's tokenizer."""

import importlib.util
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path


def run(jar: str, arguments: Sequence[str], text: str = "") -> str:
    """Output of a program.

    Args:
      jar: its place in pycocoevalcap: "meteor/meteor-1.5.jar".
      arguments: of `java`, with "{jar}" for the file.
      text: its standard input.

    Raises:
      RuntimeError: if there is no Java or no pycocoevalcap, or the program fails.
    """
    java, found = shutil.which("java"), importlib.util.find_spec("pycocoevalcap")
    if java is None or found is None or not found.submodule_search_locations:
        missing = "no java is on the PATH" if java is None else "pycocoevalcap is not installed"
        raise RuntimeError(
            f"{jar} is a Java program of pycocoevalcap, and {missing}: install a Java runtime and pycocoevalcap, or "
            "use the scores that need none (java=False)"
        )
    file = str(Path(next(iter(found.submodule_search_locations))) / jar)
    command = [java, "-Dfile.encoding=UTF-8", "-Xmx2G", *(file if item == "{jar}" else item for item in arguments)]
    done = subprocess.run(command, input=text, capture_output=True, encoding="utf-8", check=False)
    if done.returncode:
        raise RuntimeError(f"{jar} ended with status {done.returncode}: {done.stderr.strip()[-500:]}")
    return done.stdout
