"""The data doctor: what training would meet in a data set, found out beforehand and without a GPU."""

from .diagnosis import Diagnosis
from .examine import examine

__all__ = ["Diagnosis", "examine"]
