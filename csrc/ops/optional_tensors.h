// Lists of tensors that may be missing, `Tensor?[]` in the schemas of the ops. The header of c10::List costs a compiler 1.3 s
// and 95 MB. The dispatcher's header includes it, so dispatched.cpp has these functions.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <optional>

namespace dlk {

using OptionalTensor = std::optional<at::Tensor>;
using OptionalTensors = c10::List<OptionalTensor>;

size_t size_of(const OptionalTensors&);
OptionalTensor get(const OptionalTensors&, size_t index);

// A list that is made here, for a call.
class OptionalTensorList {
 public:
  OptionalTensorList();
  OptionalTensorList(const OptionalTensorList&) = delete;
  OptionalTensorList& operator=(const OptionalTensorList&) = delete;
  ~OptionalTensorList();

  void push_back(OptionalTensor tensor);
  operator const OptionalTensors&() const;  // lives as long as this list

 private:
  alignas(void*) std::byte list_[sizeof(void*)];  // an OptionalTensors
};

}  // namespace dlk
