#include "ops/dispatched.h"

#include <ATen/core/dispatch/Dispatcher.h>

#include <memory>
#include <new>
#include <utility>

#include "ops/optional_tensors.h"
#include "ops/tensors.h"

namespace dlk {

// The handle lives as long as the process: the callers keep it in static variables.
template <class R, class... Args>
Dispatched<R(Args...)>::Dispatched(const char* name)
    : handle_(new auto(c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<R(Args...)>())) {}

template <class R, class... Args>
R Dispatched<R(Args...)>::call(Args... args) const {
  return static_cast<const c10::TypedOperatorHandle<R(Args...)>*>(handle_)->call(std::forward<Args>(args)...);
}

namespace {

using T = const at::Tensor&;
using OptionalT = const OptionalTensor&;
using Ts = at::TensorList;
using OptionalTs = const OptionalTensors&;
using Ints = at::IntArrayRef;
using Int = int64_t;
using Tensors = std::vector<at::Tensor>;
using Two = std::tuple<at::Tensor, at::Tensor>;
using Three = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using Four = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using Five = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

}  // namespace

// One layer: recorded, forward, forward with z or a mask, and the backwards.
template class Dispatched<at::Tensor(T, T, OptionalT, Int, double, bool)>;
template class Dispatched<at::Tensor(T, T, OptionalT, Int, double)>;
template class Dispatched<Two(T, T, OptionalT, Int, double)>;
template class Dispatched<Three(T, OptionalT, OptionalT, T, Int, double, bool, bool, bool)>;
template class Dispatched<Three(T, OptionalT, OptionalT, T, at::ScalarType, Int, double, bool, bool, bool)>;

// A gated layer: recorded or forward, forward with the preactivations, and the backwards.
template class Dispatched<at::Tensor(T, T, T, OptionalT, OptionalT, Int, double)>;
template class Dispatched<Three(T, T, T, OptionalT, OptionalT, Int, double)>;
template class Dispatched<Five(T, OptionalT, OptionalT, OptionalT, OptionalT, OptionalT, Int, double, bool, bool, bool,
                               bool, bool)>;
template class Dispatched<Five(OptionalT, OptionalT, OptionalT, OptionalT, OptionalT, OptionalT, OptionalT, OptionalT,
                               Int, double, bool, bool, bool, bool, bool)>;
template class Dispatched<Two(T, T, OptionalT, Int, double, bool)>;
template class Dispatched<Three(T, OptionalT, OptionalT, T, Int, double, bool, bool, bool, bool)>;

// A chain: recorded, forward, the backwards, and a training step.
template class Dispatched<at::Tensor(T, Ts, OptionalTs, Ints, double)>;
template class Dispatched<Tensors(T, Ts, OptionalTs, Ints, double, Ints)>;
template class Dispatched<Tensors(T, OptionalT, OptionalTs, OptionalT, Ts, Ints, Ints, double, Ints, bool)>;
template class Dispatched<std::tuple<at::Tensor, at::Tensor, Tensors>(T, Ts, OptionalTs, Ints, double, T, Int,
                                                                      OptionalT, Int, Int, double, Ints)>;

// Losses: recorded, forward and the differentiable backward of each.
template class Dispatched<at::Tensor(T, T, Int)>;
template class Dispatched<at::Tensor(T, T, OptionalT, Int, Int, double)>;
template class Dispatched<Two(T, T, Int, bool)>;
template class Dispatched<Two(T, T, T, Int, bool, bool)>;
template class Dispatched<Three(T, T, T, bool, double, Int, bool, bool)>;
template class Dispatched<Three(T, T, T, T, bool, double, Int, bool, bool, bool)>;
template class Dispatched<Three(T, T, OptionalT, Int, Int, double, bool, bool)>;
template class Dispatched<Two(T, T, T, OptionalT, Int, Int, double, bool, bool)>;
template class Dispatched<Four(T, T, OptionalT, T, OptionalT, OptionalT, Int, Int, double, bool, bool, bool)>;
template class Dispatched<Three(T, T, T, OptionalT, T, OptionalT, Int, Int, double, bool, bool, bool)>;

// ---- ops/optional_tensors.h ----------------------------------------------------------------------------------------

namespace {

OptionalTensors* list_in(std::byte* memory) { return std::launder(reinterpret_cast<OptionalTensors*>(memory)); }
const OptionalTensors* list_in(const std::byte* memory) {
  return std::launder(reinterpret_cast<const OptionalTensors*>(memory));
}

}  // namespace

size_t size_of(const OptionalTensors& list) { return list.size(); }
OptionalTensor get(const OptionalTensors& list, size_t index) { return list.get(index); }

OptionalTensorList::OptionalTensorList() {
  static_assert(sizeof(OptionalTensors) == sizeof(list_) && alignof(OptionalTensors) <= alignof(void*));
  new (list_) OptionalTensors;
}
OptionalTensorList::~OptionalTensorList() { std::destroy_at(list_in(list_)); }

void OptionalTensorList::push_back(OptionalTensor tensor) { list_in(list_)->push_back(std::move(tensor)); }
OptionalTensorList::operator const OptionalTensors&() const { return *list_in(list_); }

}  // namespace dlk
