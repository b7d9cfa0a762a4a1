// Guarded memory with C signatures, for ctypes.
#ifdef __CUDACC__
#include "guarded_on_device.h"
#else
#include "guarded.h"
#endif

extern "C" {

#ifdef __CUDACC__
using cuda_on_device::Guarded;

void* guarded_new(size_t bytes) { return new Guarded(bytes); }
void* guarded_data(void* memory) {
  return static_cast<Guarded*>(memory)->device + static_cast<Guarded*>(memory)->before;
}
void* guarded_host(void* memory) {
  return static_cast<Guarded*>(memory)->host.data() + static_cast<Guarded*>(memory)->before;
}
bool on_device() { return true; }
#else
using cuda_emulation::Guarded;

// Allocate memory beyond whose last byte no access is possible (guarded.h).
void* guarded_new(size_t bytes) {
  auto* memory = new Guarded;
  memory->allocate(bytes);
  return memory;
}
void* guarded_data(void* memory) { return static_cast<Guarded*>(memory)->data; }
// The same bytes as the test reads and writes them.
void* guarded_host(void* memory) { return guarded_data(memory); }
bool on_device() { return false; }
#endif

void guarded_delete(void* memory) { delete static_cast<Guarded*>(memory); }

}  // extern "C"
