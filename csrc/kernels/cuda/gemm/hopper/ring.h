// The arithmetic of the Hopper kernel that needs no GPU: the place in the ring, the layout of an operand, and
// descriptors.
#pragma once

#include <cstdint>

#include "kernels/params.h"

namespace dlk::cuda {

// A place in a ring of kStages buffers. A buffer is filled and emptied in turn. The k-th filling completes phase k of
// its `full` barrier, and the k-th emptying completes phase k of its `empty` barrier. A barrier can be asked for the
// parity of a phase.
template <int kStages>
struct RingPlace {
  int stage = 0;
  uint32_t parity = 0;  // of the number of completed rounds

  DLK_HD void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

// The 64-bit matrix descriptor of wgmma (PTX ISA, "Matrix Descriptor Format"), for 128-byte swizzling: bits 0-13 the
// address, 16-29 the leading and 32-45 the stride dimension's byte offset, each shifted right by 4; 49-51 the base
// offset, 0 as the pattern starts at a multiple of 1024 bytes; 62-63 the swizzling, 1 for 128 bytes.
DLK_HD uint64_t shared_descriptor(uint32_t address, uint32_t leading_bytes, uint32_t stride_bytes) {
  auto field = [](uint32_t bytes) { return static_cast<uint64_t>((bytes & 0x3ffff) >> 4); };
  return field(address) | field(leading_bytes) << 16 | field(stride_bytes) << 32 | uint64_t{1} << 62;
}

// A tile of an operand in shared memory, as TMA writes it and wgmma reads it: kExtent rows of A (or columns of B) by 64
// steps of k, of 16-bit elements. It consists of boxes with swizzled rows of 128 bytes. With kAlongK, k runs along
// these rows, and one box holds the tile. Otherwise a box holds 64 rows of A by the 64 steps, and the boxes follow each
// other.
template <bool kAlongK_, int kExtent>
struct SharedOperand {
  static constexpr bool kAlongK = kAlongK_;
  static constexpr int kSteps = 64, kRowBytes = 128;
  static constexpr int kBoxRows = kAlongK ? kExtent : kSteps, kBoxBytes = kBoxRows * kRowBytes;
  static constexpr int kBoxes = kAlongK ? 1 : kExtent / 64, kBytes = kBoxes * kBoxBytes;
  static_assert(kExtent % 64 == 0 && kBoxRows <= 256, "TMA's limit");

  // Return the descriptor of rows i ... and steps s ... s + 15, where i is a multiple of 64 and s of 16. The tile
  // begins at a multiple of 1024 bytes. Eight rows of a box are one swizzle atom of 1024 bytes. The stride leads from
  // one atom to the next one down the box: to the next 8 rows of A with kAlongK, otherwise to the next 8 steps. The
  // leading offset leads from 64 rows of A to the next 64, which is the distance of boxes; with kAlongK it is not used.
  DLK_HD static uint64_t descriptor(uint32_t tile, int i, int s) {
    const int at = kAlongK ? i * kRowBytes + s * 2 : i / 64 * kBoxBytes + s * kRowBytes;
    return shared_descriptor(tile + static_cast<uint32_t>(at), kAlongK ? 16 : kBoxBytes, 8 * kRowBytes);
  }
};

}  // namespace dlk::cuda
