// An op that takes a device first, as the op of one device: for the dispatcher.
#pragma once

#include "ops/device.h"

namespace dlk {

template <const Device& device, auto op>
struct On;
template <const Device& device, class R, class... Args, R (*op)(const Device&, Args...)>
struct On<device, op> {
  static R call(Args... args) { return op(device, args...); }
};

}  // namespace dlk
