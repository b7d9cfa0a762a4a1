"""The names of the GPUs of this machine, asked of the driver's management library.

CUDA is not initialised so, and a process may still be forked.
"""

from __future__ import annotations

import ctypes
import functools


@functools.cache
def gpu_names() -> tuple[str, ...]:
    """Return each name once, such as "NVIDIA H200"; () where the driver cannot be asked."""
    try:
        return _asked(ctypes.CDLL("libnvidia-ml.so.1"))
    except (OSError, AttributeError):  # no driver, or one without these functions
        return ()


def _asked(driver: ctypes.CDLL) -> tuple[str, ...]:
    if driver.nvmlInit_v2():
        return ()
    try:
        count, names = ctypes.c_uint(), []
        if driver.nvmlDeviceGetCount_v2(ctypes.byref(count)):
            return ()
        for index in range(count.value):
            device, name = ctypes.c_void_p(), ctypes.create_string_buffer(96)
            if driver.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device)):
                continue
            if not driver.nvmlDeviceGetName(device, name, len(name)):
                names.append(name.value.decode(errors="replace"))
        return tuple(dict.fromkeys(names))
    finally:
        driver.nvmlShutdown()
