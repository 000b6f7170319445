"""The three methods: structure, schedules and controllers, without PEFT."""

from .calibration import CalibrationReport
from .lor2c_controller import LoR2CController, sfs
from .lor2c_hooks import LoR2C
from .reducer import Reducer, ReducerState

__all__ = ["CalibrationReport", "LoR2C", "LoR2CController", "Reducer", "ReducerState", "sfs"]
