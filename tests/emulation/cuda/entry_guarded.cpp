// Guarded memory with C signatures, for ctypes.
#include "guarded.h"

extern "C" {

// Allocate memory beyond whose last byte no access is possible (guarded.h).
void* guarded_new(size_t bytes) {
  auto* memory = new cuda_emulation::Guarded;
  memory->allocate(bytes);
  return memory;
}
void* guarded_data(void* memory) { return static_cast<cuda_emulation::Guarded*>(memory)->data; }
void guarded_delete(void* memory) { delete static_cast<cuda_emulation::Guarded*>(memory); }

}  // extern "C"
