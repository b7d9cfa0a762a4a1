// The ops that autograd records. Each is a Function over the private ops: its forward calls one, its backward another. A
// backward that is itself differentiated calls an op that is written in Python (dlkernels/_ops), in torch's operators.
//
// Function and AutogradContext are those of torch::autograd, whose header costs a compiler 5 s and 650 MB: it is included in
// function.cpp alone, which has one torch::autograd::Function that does the work of all ops.
#pragma once

#include <c10/core/GradMode.h>

#include <type_traits>

#include "ops/dispatched.h"
#include "ops/tensors.h"

namespace torch::autograd {
struct AutogradContext;
}

namespace dlk {

using variable_list = std::vector<at::Tensor>;

// Forward saves tensors and settings here, and backward reads them; see torch::autograd::AutogradContext. A setting is an
// int64_t, a double, a bool or a list of int64_t.
class AutogradContext {
 public:
  explicit AutogradContext(torch::autograd::AutogradContext& torchs) : torchs_(torchs) {}

  void save_for_backward(variable_list tensors);
  void set_materialize_grads(bool value);
  variable_list get_saved_variables() const;
  // `index`: among the tensors that forward was given. An optional one that is not there has no place.
  bool needs_input_grad(size_t index) const;

  void save(const char* name, int64_t value);
  void save(const char* name, double value);
  void save(const char* name, bool value);
  void save(const char* name, at::IntArrayRef value);
  template <class T>
  T saved(const char* name) const;

 private:
  torch::autograd::AutogradContext& torchs_;
};
template <>
int64_t AutogradContext::saved(const char* name) const;
template <>
double AutogradContext::saved(const char* name) const;
template <>
bool AutogradContext::saved(const char* name) const;
template <>
std::vector<int64_t> AutogradContext::saved(const char* name) const;

// The backward of an op returns a gradient for each tensor that forward was given, in their order; undefined ones may follow.
using Backward = variable_list (*)(AutogradContext*, const variable_list&);

// Enter a backward under a number. The order of entering, and so the number, is that of the library's initialisers.
int64_t number_of(Backward);

// A reference to the forward of an op with its arguments.
class AnyForward {
 public:
  template <class F>
  explicit AnyForward(const F& f)
      : object_(&f), call_([](const void* object, AutogradContext* ctx) -> variable_list {
          return {(*static_cast<const F*>(object))(ctx)};
        }) {}
  variable_list operator()(AutogradContext* ctx) const { return call_(object_, ctx); }

 private:
  const void* object_;
  variable_list (*call_)(const void*, AutogradContext*);
};

// Run forward, and record the backward of this number for its outputs.
variable_list record(at::TensorList inputs, const AnyForward& forward, int64_t backward);

// T has static functions `forward(AutogradContext*, arguments...)`, which returns one output or a list, and `backward`.
template <class T>
struct Function {
  template <class... Args>
  static variable_list apply(const Args&... args) {
    variable_list inputs;
    inputs.reserve(sizeof...(Args));
    (add_to(inputs, args), ...);
    const auto forward = [&](AutogradContext* ctx) { return T::forward(ctx, args...); };
    return record(inputs, AnyForward(forward), number);
  }

 private:
  static const int64_t number;

  template <class Arg>
  static void add_to(variable_list& inputs, const Arg& arg) {
    if constexpr (std::is_same_v<Arg, at::Tensor>) {
      inputs.push_back(arg);
    } else if constexpr (std::is_same_v<Arg, OptionalTensor>) {
      if (arg && arg->defined()) inputs.push_back(*arg);
    } else if constexpr (std::is_same_v<Arg, at::TensorList>) {
      inputs.insert(inputs.end(), arg.begin(), arg.end());
    }
  }
};

template <class T>
const int64_t Function<T>::number = number_of(&T::backward);

inline OptionalTensor present(const at::Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }

// The weight for backward: the memory that it has now, as in stock, which saves weight.t(). Somebody may give the weight
// another .data before backward. The copy shares the version, so a change in place raises. Subclasses and wrappers have no
// .data to replace, and see the weight itself.
at::Tensor with_its_memory(const at::Tensor& weight);

// Return true for a tensor of the CPU whose memory may be read and written without torch's operators: it is of no subclass, and
// no mode of torch sees operators.
bool is_plain_on_cpu(const at::Tensor&);

// Return true if nobody but autograd looks into what is done with t: it is neither a batch of gradients nor has it a tangent,
// and neither a transform of torch.func nor torch.jit.trace is active.
bool is_opaque(const at::Tensor& t);
// Return true if nobody looks into a backward that gets g, and autograd does not record it either.
inline bool is_opaque_backward(const at::Tensor& g) {
  return g.defined() && !c10::GradMode::is_enabled() && is_opaque(g);
}

}  // namespace dlk
