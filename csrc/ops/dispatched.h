// An op through torch's dispatcher: modes, subclasses, compilers and profilers see the call. The dispatcher's header costs a
// compiler 3 s and 450 MB, so it is included in dispatched.cpp alone. The signatures are listed there.
#pragma once

namespace dlk {

template <class F>
class Dispatched;

template <class R, class... Args>
class Dispatched<R(Args...)> {
 public:
  explicit Dispatched(const char* name);
  R call(Args... args) const;

 private:
  const void* handle_;
};

// The op of this name. F is its C++ signature.
template <class F>
Dispatched<F> dispatched(const char* name) {
  return Dispatched<F>(name);
}

}  // namespace dlk
