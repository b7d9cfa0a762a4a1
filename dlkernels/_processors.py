"""The names of processors, and which of them are near relatives."""

from __future__ import annotations

import contextlib
import platform

# By vendor and family: the first and the last model of near relatives, with the same cores or almost, and the model on
# which the shipped table for them was measured. Of AMD these are Zen 3 and Zen 4, by the models that Linux takes for
# them (arch/x86/kernel/cpu/amd.c). Intel's are Sapphire Rapids, Granite Rapids and Emerald Rapids (intel-family.h). The
# Xeon that was measured hides its model behind 167.
_RELATIVES = {
    "authenticamd-25": [(0, 15, 1), (32, 95, 1), (16, 31, 17), (96, 175, 17)],
    "genuineintel-6": [(143, 143, 167), (173, 174, 167), (207, 207, 167)],
}


def processor() -> str:
    """Return vendor, family and model of the CPU, such as "genuineintel-6-143"; elsewhere than on Linux on x86 the
    architecture."""
    known: dict[str, str] = {}
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            name, colon, value = line.partition(":")
            if not colon:
                break  # the first processor ends
            known.setdefault(name.strip(), value.strip())
    parts = [known.get(name, "") for name in ("vendor_id", "cpu family", "model")]
    return "-".join(parts).lower() if all(parts) else platform.machine().lower() or "unknown"


def measured_relative(name: str) -> str:
    """Return the near relative of ``name`` on which a shipped table was measured; ``name`` if there is none."""
    family, _, model = name.rpartition("-")
    if model.isdecimal():
        for first, last, measured in _RELATIVES.get(family, ()):
            if first <= int(model) <= last:
                return f"{family}-{measured}"
    return name
