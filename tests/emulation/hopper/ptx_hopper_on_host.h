// csrc/kernels/cuda/gemm/hopper/ptx_hopper.cuh in C++. Each function does what the PTX ISA says about its instruction,
// and not earlier than it says. TMA copies and wgmma products run beside the threads. Copies end in any order and at
// any time. Products read shared memory at any time between their issue and the wait for them.
#pragma once

#include <cuda.h>

#include <cstring>
#include <deque>
#include <vector>

#include "cuda_runtime.h"

namespace dlk::cuda {

using cuda_emulation::die;

inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(p) - dynamic_shared());
}

// ---- mbarrier -----------------------------------------------------------------------------------------------------

struct Barrier {
  uint8_t kind, count, pending, phase;  // phase: parity of the current one
  int32_t bytes;                        // announced and not yet written

  static constexpr uint8_t kKind = 0xb5;  // memory that was never initialised does not hold it

  static Barrier& at(uint64_t* p) {
    auto* barrier = reinterpret_cast<Barrier*>(p);
    if (barrier->kind != kKind) die("an mbarrier that is not initialised");
    return *barrier;
  }
  void arrive() {
    if (pending == 0) die("more arrivals at an mbarrier than it counts");
    --pending;
    complete_if_done();
  }
  void complete_if_done() {
    if (pending == 0 && bytes == 0) phase ^= 1, pending = count;
  }
};
static_assert(sizeof(Barrier) == sizeof(uint64_t));

inline void mbarrier_init(uint64_t* barrier, uint32_t arrivals) {
  if (reinterpret_cast<uintptr_t>(barrier) % 8) die("an mbarrier that is not 8-byte aligned");
  *reinterpret_cast<Barrier*>(barrier) = {Barrier::kKind, static_cast<uint8_t>(arrivals),
                                          static_cast<uint8_t>(arrivals), 0, 0};
}
inline void fence_barrier_init() {}
inline void mbarrier_arrive(uint64_t* barrier) {
  const cuda_emulation::races::Quiet quiet;
  Barrier::at(barrier).arrive();
}
inline void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
  const cuda_emulation::races::Quiet quiet;
  Barrier& b = Barrier::at(barrier);
  b.bytes += static_cast<int32_t>(bytes);
  b.arrive();
}
inline void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  if (parity > 1) die("a parity that is neither 0 nor 1");
  const cuda_emulation::races::Quiet quiet;
  Barrier& b = Barrier::at(barrier);
  cuda_emulation::wait_until([&b, parity] { return b.phase != parity; });
}

// ---- TMA ----------------------------------------------------------------------------------------------------------

// CU_TENSOR_MAP_SWIZZLE_128B: the number of the 16-byte chunk within 128 bytes is xor-ed with the number of the 128
// bytes within 1024.
inline uint32_t swizzled_128(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

// Until the box has been written, the destination holds the bits of NaN.
inline void tma_load(void* shared, const CUtensorMap* map, int32_t column, int32_t row, uint64_t* barrier) {
  const cuda_emulation::races::Quiet quiet;
  const uint32_t to = shared_address(shared);
  const uint32_t bytes = map->box[0] * map->box[1] * 2;
  if (to % 1024) die("a swizzled TMA box at an address that is not a multiple of 1024");
  if (map->box[0] != 64) die("a box whose rows are not 128 bytes");
  std::memset(shared, 0xff, bytes);
  const CUtensorMap of = *map;
  cuda_emulation::in_flight.push_back([=] {
    for (uint32_t r = 0; r < of.box[1]; ++r)
      for (uint32_t c = 0; c < of.box[0]; ++c) {
        const int64_t y = int64_t{row} + r, x = int64_t{column} + c;
        uint16_t element = 0;
        if (y >= 0 && x >= 0 && y < static_cast<int64_t>(of.size[1]) && x < static_cast<int64_t>(of.size[0]))
          std::memcpy(&element, of.data + static_cast<uint64_t>(y) * of.stride + static_cast<uint64_t>(x) * 2, 2);
        std::memcpy(dynamic_shared() + swizzled_128(to + r * 128 + c * 2), &element, 2);
      }
    Barrier& b = Barrier::at(barrier);
    b.bytes -= static_cast<int32_t>(bytes);
    b.complete_if_done();
  });
}

// ---- wgmma --------------------------------------------------------------------------------------------------------

// The fields of a descriptor, and the element [mn, k], k < 16, of its operand in the canonical layouts for 128-byte
// swizzling. Along k: rows of 128 bytes; 8 rows are an atom, and atoms are `stride` apart. Across: rows of 64 elements
// along mn, one per step of k; 8 rows are an atom, and atoms are `stride` apart along k and `leading` apart along mn.
struct Descriptor {
  uint32_t start, leading, stride;

  explicit Descriptor(uint64_t bits) : start(field(bits)), leading(field(bits >> 16)), stride(field(bits >> 32)) {
    if (bits >> 62 != 1) die("a descriptor of another swizzling than 128 bytes");
    if (bits >> 49 & 7) die("a descriptor with a base offset");
  }
  static uint32_t field(uint64_t bits) { return static_cast<uint32_t>(bits & 0x3fff) << 4; }

  uint16_t element(bool across, uint32_t mn, uint32_t k) const {
    const uint32_t at = across ? mn / 64 * leading + mn % 64 * 2 + k / 8 * stride + k % 8 * 128
                               : mn / 8 * stride + mn % 8 * 128 + k * 2;
    uint16_t bits;
    std::memcpy(&bits, dynamic_shared() + swizzled_128(start + at), 2);
    return bits;
  }
};

inline float to_float(uint16_t bits, Bf16) { return widen(Bf16{bits}); }
inline float to_float(uint16_t bits, F16) {
  F16 v;
  std::memcpy(&v, &bits, 2);
  return widen(v);
}

// The products of one thread: groups that are under way, the oldest first, and products that are not committed yet.
struct Products {
  std::deque<std::vector<std::function<void()>>> groups;
  std::vector<std::function<void()>> open;
};
inline Products& products() {
  static std::vector<Products> all(1024);
  return all[cuda_emulation::current->index];
}

inline void wgmma_fence() { cuda_emulation::exchange(0, "wgmma.fence"); }
inline void wgmma_commit() {
  cuda_emulation::exchange(0, "wgmma.commit");
  const cuda_emulation::races::Quiet quiet;
  products().groups.push_back(std::move(products().open));
  products().open.clear();
}
template <int kPending>
void wgmma_wait() {
  cuda_emulation::exchange(0, "wgmma.wait");
  const cuda_emulation::races::Quiet quiet;
  auto& groups = products().groups;
  for (; groups.size() > kPending; groups.pop_front())
    for (const auto& product : groups.front()) product();
}
template <int kParts>
void wgmma_wait_all(float (&)[kParts][8][4]) {
  wgmma_wait<0>();
}

// Compute only the sums of this thread, from its two rows of A and its columns of B.
template <bool kAcrossA, bool kAcrossB, int kParts, class T>
void wgmma_mma(float (&d)[kParts][8][4], uint64_t a, uint64_t b, T) {
  cuda_emulation::exchange(0, "wgmma.mma");
  const cuda_emulation::races::Quiet quiet;
  struct Operands {
    float a[2][16], b[kParts][8][2][16];
  };
  const unsigned thread = threadIdx.x % 128, lane = thread % 32;
  auto read = [=] {
    const Descriptor of_a(a), of_b(b);
    auto v = std::make_shared<Operands>();
    for (unsigned k = 0; k < 16; ++k) {
      for (unsigned half = 0; half < 2; ++half)
        v->a[half][k] = to_float(of_a.element(kAcrossA, thread / 32 * 16 + half * 8 + lane / 4, k), T{});
      for (unsigned c = 0; c < kParts; ++c)
        for (unsigned f = 0; f < 8; ++f)
          for (unsigned e = 0; e < 2; ++e)
            v->b[c][f][e][k] = to_float(of_b.element(kAcrossB, c * 64 + f * 8 + lane % 4 * 2 + e, k), T{});
    }
    return v;
  };
  auto add = [&d](const Operands& v) {
    for (unsigned c = 0; c < kParts; ++c)
      for (unsigned f = 0; f < 8; ++f)
        for (unsigned i = 0; i < 4; ++i) {
          double sum = d[c][f][i];
          for (unsigned k = 0; k < 16; ++k) sum += double{v.a[i / 2][k]} * double{v.b[c][f][i % 2][k]};
          d[c][f][i] = static_cast<float>(sum);
        }
  };
  if (cuda_emulation::toss())
    products().open.push_back([=] { add(*read()); });
  else
    products().open.push_back([=, v = read()] { add(*v); });
}

// ---- the rest -----------------------------------------------------------------------------------------------------

template <int kRegisters>
void release_registers() {
  static_assert(kRegisters % 8 == 0 && 24 <= kRegisters && kRegisters <= 256);
}
template <int kRegisters>
void claim_registers() {
  static_assert(kRegisters % 8 == 0 && 24 <= kRegisters && kRegisters <= 256);
}

inline void barrier_sync(int number, int threads) {
  const cuda_emulation::races::Quiet quiet;
  static struct {
    int come = 0, round = 0;
  } barriers[16];
  auto& barrier = barriers[number];
  const int round = barrier.round;
  if (++barrier.come == threads) {
    barrier.come = 0, ++barrier.round;
    cuda_emulation::races::passed_group(threadIdx.x / 128);
  }
  cuda_emulation::wait_until([&barrier, round] { return barrier.round != round; });
}

}  // namespace dlk::cuda
