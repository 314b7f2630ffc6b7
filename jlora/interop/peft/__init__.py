"""Adapters of Hugging Face PEFT, read and written."""

from jlora.interop.peft.load import load as load
from jlora.interop.peft.read import Folder as Folder
from jlora.interop.peft.read import read as read
from jlora.interop.peft.save import save as save
